"""The base model's own rows of a whole dataset, computed once and kept for training: on disk, or on the GPU."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedConfig

from firp.decoder.model_rules import head_counts
from firp.decoder.passes import RealRows, pseudo_rows, real_rows
from firp.decoder.view import DecoderView
from firp.tools.files import explained, read_object, write_atomically
from firp.tools.hardware import available_memory
from firp.train.data import TextDataset, make_batch, possible_anchors
from firp.train.targets import KeptRows

# Of a GPU's free memory, what kept rows may take.
GPU_SHARE = 0.5
# Anchors of a sequence whose pseudo rows pass the layers together.
ANCHORS_AT_ONCE = 64


def row_width(config: PreTrainedConfig, insertion_layer: int) -> int:
    """Numbers that training needs of one token: 2 d + 2 (L - t) Hkv D."""
    _, heads, head_dim = head_counts(config)
    return 2 * config.hidden_size + 2 * (config.num_hidden_layers - insertion_layer) * heads * head_dim


def kept_width(config: PreTrainedConfig, num_offsets: int) -> int:
    """The same where the k maps never change: (1 + k) d."""
    return (1 + num_offsets) * config.hidden_size


def fits_gpu(device: torch.device, num_bytes: int) -> bool:
    """Whether `device` is a GPU with room for kept rows beside what a step needs."""
    return device.type == "cuda" and num_bytes <= GPU_SHARE * available_memory(device)


class RowStore:
    """The real rows of every sequence of a dataset in one memory-mapped file, one record a token.

    A GPU that has room for them keeps them in its own memory, unless the file is there already: no file is made, and
    another run computes them again.

    A record holds the hidden state at the insertion layer, the final one, and each upper layer's key and value, in the
    base model's dtype: SmolLM2-135M at t = 20 takes 10 KB a token in bfloat16, LLaMA-2-7B at t = 16 about 280 KB.
    Where the maps never change, a record is what `KeptRows` has of it: 4.6 KB and 33 KB.

    Args:
        path: the file; `path` + ".json" beside it says what it was made from, how far it is, and its checksum so far.
        maps: [k, d, d] that never change, on the model's device; None: they learn.
        made_from: settings that decide the rows; a file made from others, or from other text, is refused.

    Raises:
        ValueError: a file made from other settings (the field is named), one that does not hold what is said of it, or
            more bytes than the disk has left.
        OSError: a file that cannot be written.
    """

    def __init__(
        self,
        path: Path,
        view: DecoderView,
        dataset: TextDataset,
        insertion_layer: int,
        max_length: int,
        made_from: dict,
        maps: Tensor | None = None,
    ) -> None:
        self.maps = maps
        self.path, self.record = path, path.with_name(path.name + ".json")
        self.view, self.dataset = view, dataset
        self.insertion_layer, self.max_length = insertion_layer, max_length
        text = hashlib.blake2b(dataset.tokens.tobytes() + dataset.offsets.tobytes()).hexdigest()
        self.made_from = {**made_from, "insertion_layer": insertion_layer, "max_length": max_length, "text": text}
        if maps is not None:  # pseudo rows are kept where an answer lets an anchor stand
            answers = np.concatenate([dataset.answer_mask(index).numpy() for index in range(len(dataset))])
            self.made_from["maps of start_from"] = hashlib.blake2b(
                maps.cpu().numpy().tobytes(), digest_size=6
            ).hexdigest()
            self.made_from["answers"] = hashlib.blake2b(answers.tobytes(), digest_size=6).hexdigest()
        lengths = np.minimum(np.diff(dataset.offsets), max_length)
        self.starts = np.concatenate([[0], lengths.cumsum()])
        self.order = np.argsort(lengths, kind="stable")
        self.key_shape = head_counts(view.config)[1:]
        self.layers = range(insertion_layer, view.num_layers)
        width = row_width(view.config, insertion_layer) if maps is None else kept_width(view.config, len(maps))
        size = int(self.starts[-1]) * width
        num_bytes = size * view.dtype.itemsize
        self.done, self.checksum = self._progress(num_bytes)
        self.on_gpu = not path.exists() and fits_gpu(view.device, num_bytes)
        if self.on_gpu:
            self.rows = torch.empty(size, dtype=view.dtype, device=view.device).view(-1, width)
            return
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._check_room(num_bytes)
        if not self.done:
            self._save_progress()  # before the file: one without its record is not ours to overwrite
        self._reserve(num_bytes)
        self.rows = torch.from_file(str(path), shared=True, size=size, dtype=view.dtype).view(-1, width)
        if self._checksum(self.order[: self.done], 0) != self.checksum:
            raise self._foreign("got rows of another checksum")

    def _progress(self, num_bytes: int) -> tuple[int, int]:
        """Sequences done and their checksum, from the record; (0, 0) without a file."""
        if not self.path.exists():
            return 0, 0
        try:
            state = read_object(self.record)
        except ValueError as error:
            raise self._foreign(str(error)) from error
        made_from, done, checksum = (state.get(name) for name in ("made_from", "done", "crc32"))
        if not isinstance(made_from, dict):
            raise self._foreign(f"made_from: got {type(made_from).__name__}, expected an object")
        for name, value in self.made_from.items():
            if made_from.get(name) != value:
                raise ValueError(
                    f"{name}: got {value!r}, but {self.path} was made with {made_from.get(name)!r}; remove it to "
                    "compute the rows again, or take another output folder"
                )
        if type(done) is not int or not 0 <= done <= len(self.order) or type(checksum) is not int:
            raise self._foreign(
                f"done, crc32: got {str((done, checksum))[:80]}, expected integers, done in 0..{len(self.order)}"
            )
        if done and self.path.stat().st_size != num_bytes:
            raise self._foreign(f"got {self.path.stat().st_size} bytes, expected {num_bytes}")
        return done, checksum

    def _save_progress(self) -> None:
        state = {"made_from": self.made_from, "done": self.done, "crc32": self.checksum}
        write_atomically(self.record, lambda path: path.write_text(json.dumps(state)))

    def _checksum(self, indices: np.ndarray, before: int) -> int:
        """CRC-32 of the rows of sequences, in this order, going on from `before`."""
        for index in indices:
            rows = self.rows[self.starts[index] : self.starts[index + 1]]
            before = zlib.crc32(rows.view(torch.uint8).numpy(), before)
        return before

    def _foreign(self, what: str) -> ValueError:
        return ValueError(
            f"keep_rows: {self.path} is not as {self.record.name} tells: {what}; remove both to compute them again"
        )

    def _check_room(self, num_bytes: int) -> None:
        """Say what is needed where it is plain that the disk is too small."""
        taken = self.path.stat().st_blocks * 512 if self.path.is_file() else 0
        free = shutil.disk_usage(self.path.parent).free
        if num_bytes - taken > free:
            raise ValueError(
                f"keep_rows: {self.path} needs {num_bytes / 1e9:.1f} GB, of which {taken / 1e9:.1f} GB are there and "
                f"{free / 1e9:.1f} GB are free; leave it off, or take another output folder or a smaller max_length"
            )

    def _reserve(self, num_bytes: int) -> None:
        """Take the file's blocks now: a disk that fills up under a mapped file ends the process without a word."""
        with explained(self.path), open(self.path, "ab") as file:
            if num_bytes and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, num_bytes)

    def fill(self, batch_size: int, progress: bool = True, time_limit_s: float | None = None) -> bool:
        """Compute what is missing, `batch_size` sequences of like length at a time; a run that was cut off goes on.

        Returns:
            True when every row is there, False where `time_limit_s` seconds were over before.
        """
        started = time.monotonic()
        order = self.order
        bar = tqdm(total=len(order), initial=self.done, desc="rows", unit="seq", disable=None if progress else True)
        for start in range(self.done, len(order), batch_size):
            indices = order[start : start + batch_size]
            batch = make_batch(self.dataset, indices, self.max_length)
            real = real_rows(self.view, batch.tokens.to(self.view.device), self.insertion_layer)
            if self.maps is None:
                parts = [real.inserted, real.final]
                parts += [rows.transpose(1, 2).flatten(2) for layer in self.layers for rows in real.recorded[layer]]
            else:
                parts = self._kept(real, batch.answers)
            rows = torch.cat(parts, -1).to(self.rows.device)
            for i, index in enumerate(indices):
                self.rows[self.starts[index] : self.starts[index + 1]] = rows[i, : batch.lengths[i]]
            self.done = start + len(indices)
            if not self.on_gpu:
                self.checksum = self._checksum(indices, self.checksum)
                self._save_progress()
            bar.update(len(indices))
            if time_limit_s is not None and time.monotonic() - started > time_limit_s:
                break
        bar.close()
        return self.done == len(order)

    @torch.no_grad()
    def _kept(self, real: RealRows, answers: Tensor) -> list[Tensor]:
        """Final states of the pseudo rows of every possible anchor, [B, T, k * d], of no meaning elsewhere; and the
        model's own."""
        assert self.maps is not None
        k, (batch, length, width) = len(self.maps), real.final.shape
        states = real.final.new_zeros(batch, length, k * width)
        allowed = possible_anchors(answers, k)
        most = int(allowed.sum(1).max())
        anchors = allowed.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most].to(states.device)
        first = torch.arange(batch, device=states.device)[:, None] * length
        for some in anchors.split(ANCHORS_AT_ONCE, dim=1) if most else ():  # scores of attention are [B, H, A * k, T]
            rows = pseudo_rows(self.view, self.maps, real, some, self.insertion_layer).flatten(0, 1)
            states.view(-1, k * width)[(first + some).flatten()] = rows.flatten(1)
        return [states, real.final]

    def read(self, indices: np.ndarray) -> RealRows | KeptRows:
        """Rows of the sequences at `indices`, padded on the right with zeros."""
        sequences = [self.rows[self.starts[index] : self.starts[index + 1]] for index in indices]
        rows = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True).to(self.view.device)
        size, heads = self.view.config.hidden_size, self.key_shape[0] * self.key_shape[1]
        if self.maps is not None:
            pseudo, final = rows.split([len(self.maps) * size, size], dim=-1)
            return KeptRows(pseudo.unflatten(-1, (len(self.maps), size)), final)
        inserted, final, *rest = rows.split([size, size] + [heads] * (2 * len(self.layers)), dim=-1)
        rest = [part.unflatten(-1, self.key_shape).transpose(1, 2) for part in rest]
        return RealRows(inserted, final, dict(zip(self.layers, zip(rest[::2], rest[1::2], strict=True), strict=True)))
