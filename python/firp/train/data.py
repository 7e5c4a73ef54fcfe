"""Token sequences of the base model's own text, and batches of them in an order a resume can rebuild."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from zipfile import is_zipfile

import numpy as np
import torch
from torch import Tensor

SORT_WINDOW_BATCHES = 16
SEQUENCES_AT_ONCE = 4096


@dataclass(frozen=True)
class TextDataset:
    """Prompts with answers, all sequences joined.

    Attributes:
        tokens: [total] token ids.
        offsets: [n + 1] start of each sequence in `tokens`.
        prompt_lengths: [n] tokens before the first answer.
        answers: [total] bool, which tokens are of answers; None where all after the prompt are.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    prompt_lengths: np.ndarray
    answers: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def length(self, index: int) -> int:
        return int(self.offsets[index + 1] - self.offsets[index])

    def check(self) -> None:
        """Raise ValueError, naming the array, unless the arrays are those of whole sequences with their prompts."""
        for name in ("tokens", "offsets", "prompt_lengths"):
            array = getattr(self, name)
            if array.ndim != 1 or array.dtype.kind not in "iu":
                raise ValueError(f"{name}: got {array.dtype} of shape {array.shape}, expected integers [n]")
        if len(self) < 1:
            raise ValueError("prompt_lengths: got none, expected at least one sequence")
        if len(self.offsets) != len(self) + 1:
            raise ValueError(f"offsets: got {len(self.offsets)}, expected {len(self) + 1} (sequences and the end)")
        ends = int(self.offsets[0]), int(self.offsets[-1])
        if ends != (0, len(self.tokens)):
            raise ValueError(f"offsets: got {ends[0]} to {ends[1]}, expected 0 to {len(self.tokens)} (tokens)")
        lengths, prompts = np.diff(self.offsets.astype(np.int64)), self.prompt_lengths.astype(np.int64)
        if bad := np.flatnonzero((prompts < 1) | (prompts > lengths)).tolist():
            raise ValueError(
                f"prompt_lengths: got {prompts[bad[0]]} in sequence {bad[0]}, expected 1..{lengths[bad[0]]} (its "
                f"tokens)"
            )
        if self.tokens.min() < 0:
            raise ValueError(f"tokens: got {self.tokens.min()}, expected at least 0")

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise ValueError for text of another model, as far as its tokens tell."""
        if self.tokens.max() >= vocab_size:
            raise ValueError(
                f"data: got token {self.tokens.max()}, expected 0..{vocab_size - 1} (the model's vocabulary)"
            )

    def sequence(self, index: int) -> Tensor:
        return torch.from_numpy(self.tokens[self.offsets[index] : self.offsets[index + 1]].astype(np.int64))

    def answer_mask(self, index: int) -> Tensor:
        """Which tokens of a sequence are of an answer."""
        if self.answers is None:
            return torch.arange(self.length(index)) >= int(self.prompt_lengths[index])
        return torch.from_numpy(self.answers[self.offsets[index] : self.offsets[index + 1]])


@dataclass(frozen=True)
class Batch:
    """Sequences padded on the right with token 0.

    Attributes:
        tokens: [B, T].
        lengths: [B] real tokens of each.
        answers: [B, T] bool, which tokens are of answers.
    """

    tokens: Tensor
    lengths: Tensor
    answers: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(self.tokens.to(device), self.lengths.to(device), self.answers.to(device))


def load_dataset(path: str | Path) -> TextDataset:
    """Read a file written by `firp distill`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is damaged or lacks an array, or whose arrays disagree; file and array are named.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"data: got {str(path)!r}, expected an existing file")
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            dataset = TextDataset(arrays["tokens"], arrays["offsets"], arrays["prompt_lengths"])
        dataset.check()
    except Exception as error:
        reason = error if is_zipfile(path) else "it is no .npz file"
        raise ValueError(f"data: cannot read {str(path)!r} as the output of `firp distill`: {reason}") from error
    return dataset


def possible_anchors(answers: Tensor, num_offsets: int) -> Tensor:
    """Positions [B, T] whose k targets are inside one answer, of the mask `answers` [B, T]."""
    allowed = torch.zeros_like(answers)
    if answers.shape[1] > num_offsets:
        allowed[:, :-num_offsets] = answers[:, 1:].unfold(1, num_offsets, 1).all(-1)
    return allowed


def frequent_tokens(dataset: TextDataset, indices: np.ndarray, count: int, vocab_size: int) -> Tensor:
    """The `count` token ids that are most frequent in the answers of the sequences at `indices`, ascending [count].

    Of equally frequent ones the lower ids are taken.
    """
    times = torch.zeros(vocab_size, dtype=torch.int64)
    for start in range(0, len(indices), SEQUENCES_AT_ONCE):
        some = [dataset.sequence(i)[dataset.answer_mask(i)] for i in indices[start : start + SEQUENCES_AT_ONCE]]
        times += torch.bincount(torch.cat(some), minlength=vocab_size)
    return times.argsort(descending=True, stable=True)[:count].sort().values


def split_held_out(dataset: TextDataset, held_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (training, held-out) sequence indices; held-out ones are spread evenly over the file."""
    if not 1 <= held_out < len(dataset):
        raise ValueError(f"held_out: got {held_out}, expected 1..{len(dataset) - 1} ({len(dataset)} sequences)")
    chosen = np.linspace(0, len(dataset) - 1, held_out).round().astype(np.int64)
    mask = np.zeros(len(dataset), dtype=bool)
    mask[chosen] = True
    return np.flatnonzero(~mask), np.flatnonzero(mask)


def make_batch(dataset: TextDataset, indices: np.ndarray, max_length: int) -> Batch:
    """Stack the sequences at `indices`, cut to `max_length` tokens."""
    sequences = [dataset.sequence(i)[:max_length] for i in indices]
    lengths = torch.tensor([len(s) for s in sequences])
    tokens = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    masks = [dataset.answer_mask(i)[:max_length] for i in indices]
    return Batch(tokens, lengths, torch.nn.utils.rnn.pad_sequence(masks, batch_first=True))


def epoch_batches(
    dataset: TextDataset, indices: np.ndarray, batch_size: int, seed: int, epoch: int
) -> list[np.ndarray]:
    """Batches of one epoch: shuffled, sorted by length within windows to save padding, shuffled again.

    The order depends on (seed, epoch) alone.
    """
    random = np.random.default_rng((seed, epoch))
    order = random.permutation(indices)
    window = batch_size * SORT_WINDOW_BATCHES
    batches = []
    for start in range(0, len(order), window):
        part = sorted(order[start : start + window], key=dataset.length)
        batches += [np.array(part[i : i + batch_size]) for i in range(0, len(part), batch_size)]
    random.shuffle(batches)
    return batches


class BatchOrder:
    """Sequence indices of every training step, counted from 0 over all epochs.

    An epoch is sorted once, not at every step: with many sequences that takes longer than a step on a GPU.
    """

    def __init__(self, dataset: TextDataset, indices: np.ndarray, batch_size: int, seed: int) -> None:
        self.arguments = (dataset, indices, batch_size, seed)
        self.per_epoch = -(-len(indices) // batch_size)
        self.epoch = -1
        self.batches: list[np.ndarray] = []

    def at(self, step: int) -> np.ndarray:
        """Sequence indices of training step `step`."""
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            self.epoch, self.batches = epoch, epoch_batches(*self.arguments, epoch)
        return self.batches[place]
