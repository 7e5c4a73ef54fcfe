"""`firp train`: ridge start, KL steps, held-out accuracy, checkpoints that resume exactly."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from firp.decoder.passes import Packing, RealRows, real_rows
from firp.decoder.view import DecoderView
from firp.drafting.predictor import FirpPredictor
from firp.drafting.profile import FILE_NAME as PROFILE
from firp.drafting.transition import UnitEmbeddings
from firp.generation.batch import stop_ids
from firp.tools.files import check_writable, locked
from firp.tools.models import load_model
from firp.train import run_files
from firp.train.config import TrainConfig
from firp.train.conversations import read_conversations
from firp.train.data import BatchOrder, TextDataset, load_dataset, make_batch, split_held_out
from firp.train.objective import Objective, OffsetScores, sample_anchors
from firp.train.ranks import TrainingRanks
from firp.train.reporting import Reporter
from firp.train.rows import RowStore
from firp.train.start import set_start, start_of
from firp.train.targets import KeptRows
from firp.train.worth import write_profile

CHECKPOINT = "checkpoint.pt"
ROWS = "rows.bin"
LOG = "train_log.jsonl"
PROFILE_OFFSETS = 16  # its size grows with their cube


class Trainer:
    """One training run in the folder `output`; a folder with a checkpoint of the same config is resumed.

    With several ranks each has the base model and a part of every batch. Gradients are added up, so batches, anchors
    and results do not depend on how many there are, up to the order of sums. Rank 0 reads and writes the output.

    Args:
        report_to: "tensorboard", "wandb" or "none".
        ranks: the processes that train together; this one alone by default.

    Raises:
        ValueError, FileNotFoundError: unreadable data, a bad setting, settings that ranks cannot share.
        OSError: an output that cannot be written. What rank 0 finds, every rank raises.
    """

    def __init__(
        self,
        config: TrainConfig,
        output: str | Path,
        device: str = "cpu",
        progress: bool = True,
        report_to: str = "none",
        ranks: TrainingRanks | None = None,
    ) -> None:
        self.config = config
        self.output = Path(output)
        self.device = torch.device(device)
        self.ranks = ranks or TrainingRanks()
        self.progress = progress and self.ranks.leads
        self.ranks.check(config)
        self.reporter = Reporter("none", self.output, asdict(config))
        self.ranks.first(lambda: self.check_output(report_to))
        conversations = Path(config.data).suffix == ".jsonl" or Path(config.data).is_dir()
        if not conversations:
            self.dataset: TextDataset = load_dataset(config.data)
        elif not Path(config.data).exists():
            raise FileNotFoundError(f"data: got {config.data!r}, expected an existing file or folder")
        self.model, tokenizer = load_model(config.model, config.dtype, self.device)
        if conversations:
            stops = stop_ids(self.model) | {tokenizer.eos_token_id}
            self.dataset = read_conversations(Path(config.data), tokenizer, stops)
        self.train_indices, self.held_out_indices = split_held_out(self.dataset, config.held_out)
        self.order = BatchOrder(self.dataset, self.train_indices, config.batch_size, config.seed)
        self.model.requires_grad_(False)
        self.dataset.check_vocabulary(self.model.config.vocab_size)
        self.view = DecoderView(self.model)
        self.predictor = self.make_predictor()
        groups = self.parameter_groups()
        self.optimizer = torch.optim.AdamW(groups)
        self.trained = [parameter for group in groups if group["peak"] for parameter in group["params"]]
        self.objective = self.make_objective()
        self.step = 0
        self.seconds = 0.0
        self.store = self.open_store() if config.keep_rows else None

    def check_output(self, report_to: str) -> None:
        """On rank 0: whether figures can be reported and files written."""
        self.reporter = Reporter(report_to, self.output, asdict(self.config))
        check_writable(self.output / CHECKPOINT)

    def make_predictor(self) -> FirpPredictor:
        """What is trained."""
        config = self.config
        made = FirpPredictor.for_model(self.model, config.num_offsets, config.insertion_layer, **config.sizes)
        return made.to(self.device)

    def parameter_groups(self) -> list[dict]:
        """Parameters of the optimizer, each group with its peak learning rate."""
        config = self.config
        groups: list[dict] = [{"params": self.predictor.map_tensors, "peak": config.learning_rate, "weight_decay": 0.0}]
        for tensors, decay in (([self.predictor.transition], 0.05), (self.predictor.update_tensors, 0.2)):
            if tensors and tensors[0] is not None:
                groups += [{"params": tensors, "peak": config.transition_learning_rate, "weight_decay": decay}]
        return groups

    def make_objective(self) -> Objective:
        """The loss of a batch."""
        config = self.config
        return Objective(
            self.view,
            config.insertion_layer,
            config.offset_decay ** torch.arange(config.num_offsets, device=self.device),
            UnitEmbeddings(self.view) if config.transition_rank else None,
            trains_maps=config.learning_rate > 0,
        )

    def set_start(self) -> None:
        """Give the predictor its first weights."""
        set_start(self.predictor, self.config, self.view, self.dataset, self.train_indices, self.ranks, self.progress)

    def write_result(self) -> None:
        """Put the trained predictor and its profile into `output`."""
        (self.output / PROFILE).unlink(missing_ok=True)  # that of an earlier predictor
        run_files.write_predictor(self.output, self.predictor)
        if self.config.num_offsets <= PROFILE_OFFSETS:
            write_profile(self.output / PROFILE, self.view, self.predictor, self.dataset, self.held_out_indices)

    def run(self, time_limit_s: float | None = None, checkpoint_every: int = 50, evaluate_every: int = 200) -> bool:
        """Train until `config.steps`, or stop after `time_limit_s` seconds with a checkpoint, or with part of the rows
        kept.

        Returns:
            True when all steps are done; the predictor is then in `output`.

        Raises:
            ValueError: a limit that is no number of seconds.
            OSError: the disk refuses a file (the last checkpoint stays), or another process trains in the same folder.
        """
        if time_limit_s is not None and not time_limit_s >= 0:
            raise ValueError(f"time_limit: got {time_limit_s:g}, expected at least 0 (seconds)")
        with ExitStack() as held:
            self.ranks.first(lambda: held.enter_context(locked(self.output)))
            return self._run(time_limit_s, checkpoint_every, evaluate_every)

    def _run(self, time_limit_s: float | None, checkpoint_every: int, evaluate_every: int) -> bool:
        started = time.monotonic()
        if self.store is not None:
            # What a GPU keeps in its memory would be lost.
            limit = None if self.store.on_gpu else time_limit_s
            if not self.store.fill(self.config.batch_size, self.progress, limit):
                return False
        resumed = self.load_checkpoint()
        self.ranks.first(lambda: self.open_log(resumed))
        if not resumed:
            self.initialize()
            self.save_checkpoint()
        hidden = None if self.progress else True
        bar = tqdm(total=self.config.steps, initial=self.step, desc="train", disable=hidden, smoothing=0.05)
        while self.step < self.config.steps:
            step_started = time.monotonic()
            scores = self.train_step()
            self.seconds += time.monotonic() - step_started
            self.log("train", scores, learning_rate=self.config.learning_rate * self.config.schedule(self.step - 1))
            bar.update()
            bar.set_postfix_str(" ".join(f"kl{j + 1}={x:.3f}" for j, x in enumerate(scores.means()["kl"])))
            done = self.step == self.config.steps
            if self.step % evaluate_every == 0 or done:
                self.log("held_out", self.evaluate())
            out_of_time = time_limit_s is not None and self.ranks.first(
                lambda: time.monotonic() - started > time_limit_s
            )
            if self.step % checkpoint_every == 0 or done or out_of_time:
                self.save_checkpoint()
            if out_of_time and not done:
                self.reporter.end()
                return False
        bar.close()
        self.reporter.end()
        if self.ranks.leads:
            self.write_result()
        return True

    def initialize(self) -> None:
        """Start from another predictor or from the closed form, and log the held-out accuracy of that start."""
        self.set_start()
        self.log("start", self.evaluate())

    def train_step(self) -> OffsetScores:
        config = self.config
        indices = self.order.at(self.step)
        self.optimizer.zero_grad()
        scores = self.score(indices, seed=config.seed * 1_000_003 + self.step, want_gradient=True)
        for parameter in self.trained:
            if parameter.grad is None:  # no anchor is this rank's
                parameter.grad = torch.zeros_like(parameter)
        self.ranks.sum(parameter.grad for parameter in self.trained if parameter.grad is not None)
        for group in self.optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
            group["lr"] = group["peak"] * config.schedule(self.step)
        self.optimizer.step()
        self.step += 1
        return scores

    def score(self, indices: np.ndarray, seed: int, want_gradient: bool) -> OffsetScores:
        """The objective at anchors of the sequences at `indices`; gradients are of this rank's part."""
        config = self.config
        generator = torch.Generator().manual_seed(seed)
        batch = make_batch(self.dataset, indices, config.max_length)
        anchors, valid = sample_anchors(batch, config.num_offsets, config.anchors, generator)
        count = max(int(valid.sum()), 1)
        indices, anchors, valid = (self.ranks.share(part) for part in (indices, anchors, valid))
        sums = torch.zeros(6, config.num_offsets, device=self.device)
        if len(indices):
            batch = make_batch(self.dataset, indices, config.max_length)
            tokens, anchors, valid = (tensor.to(self.device) for tensor in (batch.tokens, anchors, valid))
            real = self.real_rows(indices)
            scores = self.objective(self.predictor, tokens, real, anchors, valid, want_gradient, count)
            if self.ranks.size == 1:
                return scores
            sums += scores.sums().to(self.device)
        self.ranks.sum([sums])
        return OffsetScores.of(sums, count)

    def real_rows(self, indices: np.ndarray) -> RealRows | KeptRows:
        """The base model's own rows of the sequences at `indices`, kept or computed."""
        if self.store is not None:
            return self.store.read(indices)
        batch = make_batch(self.dataset, indices, self.config.max_length)
        packing = Packing.of(batch.lengths, self.config.max_length) if self.config.pack else None
        return real_rows(self.view, batch.tokens.to(self.device), self.config.insertion_layer, packing)

    def open_store(self) -> RowStore:
        config = self.config
        made_from = {name: getattr(config, name) for name in ("model", "data", "dtype")}
        path = self.output / ROWS
        maps = start_of(config, self.view).weight.detach().to(self.device) if config.keeps_pseudo_rows else None
        return RowStore(path, self.view, self.dataset, config.insertion_layer, config.max_length, made_from, maps)

    def evaluate(self) -> OffsetScores:
        """Scores on the held-out sequences, at anchors that are the same at every call."""
        size = self.config.batch_size
        starts = range(0, len(self.held_out_indices), size)
        return OffsetScores.total(
            [
                self.score(self.held_out_indices[start : start + size], seed=start, want_gradient=False)
                for start in starts
            ]
        )

    def open_log(self, resumed: bool) -> None:
        """On rank 0: drop log lines past the checkpoint, of a run that was killed, and go on reporting."""
        run_files.cut_log(self.output / LOG, self.step if resumed else -1)
        self.reporter.start(self.step)

    def log(self, event: str, scores: OffsetScores, **extra: float) -> None:
        if not self.ranks.leads:
            return
        record = {"event": event, "step": self.step, "seconds": round(self.seconds, 3), **extra}
        record |= {name: [round(x, 5) for x in value.tolist()] for name, value in scores.means().items()}
        run_files.append_line(self.output / LOG, json.dumps(record))
        self.reporter.report(record)

    def save_checkpoint(self) -> None:
        state = {
            "config": asdict(self.config),
            "step": self.step,
            "seconds": self.seconds,
            "predictor": self.predictor.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        self.ranks.first(lambda: run_files.write_checkpoint(self.output / CHECKPOINT, state))

    def load_checkpoint(self) -> bool:
        """Continue from the checkpoint, if there is one. Rank 0 reads it.

        Raises:
            ValueError: a checkpoint that cannot be read, or one of another configuration (the field is named).
        """
        path = self.output / CHECKPOINT

        def read() -> dict | None:
            return run_files.read_checkpoint(path, asdict(self.config), torch.device("cpu")) if path.is_file() else None

        state = self.ranks.first(read)
        if state is None:
            return False
        run_files.restore(path, state, self.predictor, self.optimizer)
        self.step = state["step"]
        self.seconds = state["seconds"]
        return True
