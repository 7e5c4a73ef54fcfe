"""`firp train`: ridge start, KL steps, held-out accuracy, checkpoints that resume exactly."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from firp.decoder.passes import RealRows, real_rows
from firp.decoder.view import DecoderView
from firp.drafting.predictor import FirpPredictor, load_predictor
from firp.drafting.profile import FILE_NAME as PROFILE
from firp.drafting.profile import save_profile
from firp.drafting.recording import make_profile
from firp.drafting.transition import UnitEmbeddings, token_tables
from firp.engine.engine import Engine
from firp.generation.batch import greedy_answers
from firp.tools.files import check_writable, locked, write_atomically
from firp.tools.models import load_model
from firp.train import run_files
from firp.train.config import TrainConfig
from firp.train.data import Batch, BatchOrder, TextDataset, epoch_batches, load_dataset, make_batch, split_held_out
from firp.train.objective import Objective, OffsetScores, sample_anchors
from firp.train.ridge import RidgeAccumulator, hidden_at_insertion
from firp.train.rows import RowStore

CHECKPOINT = "checkpoint.pt"
ROWS = "rows.bin"
LOG = "train_log.jsonl"
SOURCE_SCALE = 0.01
PROFILE_PROMPTS, PROFILE_TOKENS, PROFILE_AT_ONCE = 32, 96, 8
PROFILE_OFFSETS = 16  # its size grows with their cube


class Trainer:
    """One training run in the folder `output`; a folder with a checkpoint of the same config is resumed."""

    def __init__(self, config: TrainConfig, output: str | Path, device: str = "cpu", progress: bool = True) -> None:
        self.config = config
        self.output = Path(output)
        self.device = torch.device(device)
        self.progress = progress
        check_writable(self.output / CHECKPOINT)
        self.dataset: TextDataset = load_dataset(config.data)
        self.train_indices, self.held_out_indices = split_held_out(self.dataset, config.held_out)
        self.order = BatchOrder(self.dataset, self.train_indices, config.batch_size, config.seed)
        self.model, _ = load_model(config.model, config.dtype, self.device)
        self.model.requires_grad_(False)
        self.dataset.check_vocabulary(self.model.config.vocab_size)
        self.view = DecoderView(self.model)
        self.predictor = self.make_predictor()
        self.optimizer = torch.optim.AdamW(self.parameter_groups())
        self.objective = self.make_objective()
        self.step = 0
        self.seconds = 0.0
        self.store = self.open_store() if config.keep_rows else None

    def make_predictor(self) -> FirpPredictor:
        """What is trained, before its first step."""
        config = self.config
        predictor = FirpPredictor.for_model(
            self.model, config.num_offsets, config.insertion_layer,
            transition_rank=config.transition_rank, refiner_width=config.refiner_width,
        )  # fmt: skip
        transition, inputs = predictor.transition, predictor.refiner_inputs
        generator = torch.Generator().manual_seed(config.seed)
        with torch.no_grad():
            if transition is not None:
                transition[0] = torch.randn(transition.shape[1:], generator=generator) * SOURCE_SCALE
            if inputs is not None:
                spread = (inputs.shape[1] * inputs.shape[-1]) ** -0.5
                inputs.copy_(torch.randn(inputs.shape, generator=generator) * spread)
        return predictor.to(self.device)

    def parameter_groups(self) -> list[dict]:
        """Parameters of the optimizer, each group with its peak learning rate."""
        config = self.config
        groups = [{"params": [self.predictor.weight], "peak": config.learning_rate, "weight_decay": 0.0}]
        if config.transition_rank:
            groups += [
                {"params": [self.predictor.transition], "peak": config.transition_learning_rate, "weight_decay": 0.05}
            ]
        if config.refiner_width:
            refiner = [self.predictor.refiner_inputs, self.predictor.refiner_bias, self.predictor.refiner_outputs]
            groups += [{"params": refiner, "peak": config.refiner_learning_rate, "weight_decay": 0.01}]
        return groups

    def make_objective(self) -> Objective:
        config = self.config
        return Objective(
            self.view,
            config.insertion_layer,
            config.offset_decay ** torch.arange(config.num_offsets, device=self.device),
            UnitEmbeddings(self.view) if config.transition_rank else None,
            trains_maps=config.learning_rate > 0,
        )

    def run(self, time_limit_s: float | None = None, checkpoint_every: int = 50, evaluate_every: int = 200) -> bool:
        """Train until `config.steps`, or stop after `time_limit_s` seconds with a checkpoint, or with part of the rows
        kept.

        Returns:
            True when all steps are done; the predictor is then in `output`.

        Raises:
            OSError: the disk refuses a file (the last checkpoint stays), or another process trains in the same folder.
        """
        with locked(self.output):
            return self._run(time_limit_s, checkpoint_every, evaluate_every)

    def _run(self, time_limit_s: float | None, checkpoint_every: int, evaluate_every: int) -> bool:
        started = time.monotonic()
        if self.store is not None and not self.store.fill(self.config.batch_size, self.progress, time_limit_s):
            return False
        if (self.output / CHECKPOINT).is_file():
            self.load_checkpoint()
        else:
            run_files.cut_log(self.output / LOG, -1)
            self.initialize()
            self.save_checkpoint()
        bar = tqdm(
            total=self.config.steps,
            initial=self.step,
            desc="train",
            disable=None if self.progress else True,
            smoothing=0.05,
        )
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
            out_of_time = time_limit_s is not None and time.monotonic() - started > time_limit_s
            if self.step % checkpoint_every == 0 or done or out_of_time:
                self.save_checkpoint()
            if out_of_time and not done:
                return False
        bar.close()
        self.write_result()
        return True

    def write_result(self) -> None:
        """Put the trained predictor and its profile into `output`."""
        (self.output / PROFILE).unlink(missing_ok=True)  # that of an earlier predictor
        run_files.write_predictor(self.output, self.predictor)
        if self.config.num_offsets <= PROFILE_OFFSETS:
            self.write_profile()

    def write_profile(self) -> None:
        """Record what the predictor drafts at the positions of the model's greedy answers to held-out prompts."""
        prompts: list[torch.Tensor] = []
        room = self.model.config.max_position_embeddings - PROFILE_TOKENS - self.config.num_offsets
        for index in self.held_out_indices:
            prompt = self.dataset.sequence(index)[: self.dataset.prompt_lengths[index]]
            if len(prompt) <= room and len(prompts) < PROFILE_PROMPTS:
                prompts.append(prompt)
        if not prompts:
            return
        answers = greedy_answers(Engine(self.model), prompts, PROFILE_TOKENS, PROFILE_AT_ONCE)
        found = [(prompt, answer, "held out") for prompt, answer in zip(prompts, answers, strict=True)]
        tables = token_tables(self.view, self.predictor.transition)
        profile = make_profile(self.view, self.predictor, found, tables)
        write_atomically(self.output / PROFILE, lambda path: save_profile(path, profile))

    def initialize(self) -> None:
        """Start from another predictor or from the closed form, and log the held-out accuracy of that start."""
        config = self.config
        if config.start_from is not None:
            start = load_predictor(config.start_from)
            self.check_same_place(start)
            with torch.no_grad():
                for name, parameter in self.predictor.named_parameters():
                    if getattr(start, name) is not None:
                        parameter.copy_(getattr(start, name))
        elif config.ridge_tokens:
            self.solve_ridge()
        self.log("start", self.evaluate())

    def solve_ridge(self) -> None:
        """Start the maps from the closed form."""
        config = self.config
        accumulator = RidgeAccumulator(config.num_offsets, self.model.config.hidden_size, self.device)
        bar = tqdm(total=config.ridge_tokens, desc="ridge", unit="tok", disable=None if self.progress else True)
        for indices in epoch_batches(self.dataset, self.train_indices, config.batch_size, config.seed, 0):
            batch = make_batch(self.dataset, indices, config.max_length).to(self.device)
            before = accumulator.count
            accumulator.add(*self.ridge_rows(batch))
            bar.update(accumulator.count - before)
            if accumulator.count >= config.ridge_tokens:
                break
        bar.close()
        with torch.no_grad():
            self.predictor.weight.copy_(accumulator.solve())

    def ridge_rows(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        """What `RidgeAccumulator.add` takes of a batch."""
        return hidden_at_insertion(self.view, batch, self.config.insertion_layer), batch.lengths

    def check_same_place(self, start: FirpPredictor) -> None:
        """Raise ValueError, naming the field, unless `start` predicts the same offsets at the same layer.

        It may have no transition or refiner yet, but not one of another size.
        """
        start.check_model(self.model)
        kept = ["refiner_width"] * bool(start.refiner_width)
        if not self.config.refiner_width:  # which replaces a transition
            kept += ["transition_rank"] * bool(start.transition_rank)
        for name in ("insertion_layer", "num_offsets", *kept):
            if getattr(start, name) != getattr(self.config, name):
                raise ValueError(f"{name}: got {getattr(self.config, name)}, but start_from has {getattr(start, name)}")

    def train_step(self) -> OffsetScores:
        config = self.config
        indices = self.order.at(self.step)
        self.optimizer.zero_grad()
        scores = self.score(indices, seed=config.seed * 1_000_003 + self.step, want_gradient=True)
        for group in self.optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
            group["lr"] = group["peak"] * config.schedule(self.step)
        self.optimizer.step()
        self.step += 1
        return scores

    def score(self, indices: np.ndarray, seed: int, want_gradient: bool) -> OffsetScores:
        """The objective at anchors of the sequences at `indices`."""
        config = self.config
        batch = make_batch(self.dataset, indices, config.max_length)
        generator = torch.Generator().manual_seed(seed)
        anchors, valid = sample_anchors(batch, config.num_offsets, config.anchors, generator)
        tokens, anchors, valid = (tensor.to(self.device) for tensor in (batch.tokens, anchors, valid))
        return self.objective(self.predictor, tokens, self.real_rows(indices), anchors, valid, want_gradient)

    def real_rows(self, indices: np.ndarray) -> RealRows:
        """The base model's own rows of the sequences at `indices`, kept or computed."""
        if self.store is not None:
            return self.store.read(indices)
        tokens = make_batch(self.dataset, indices, self.config.max_length).tokens.to(self.device)
        return real_rows(self.view, tokens, self.config.insertion_layer)

    def open_store(self) -> RowStore:
        config = self.config
        made_from = {name: getattr(config, name) for name in ("model", "data", "dtype")}
        path = self.output / ROWS
        return RowStore(path, self.view, self.dataset, config.insertion_layer, config.max_length, made_from)

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

    def log(self, event: str, scores: OffsetScores, **extra: float) -> None:
        record = {"event": event, "step": self.step, "seconds": round(self.seconds, 3), **extra}
        record |= {name: [round(x, 5) for x in value.tolist()] for name, value in scores.means().items()}
        run_files.append_line(self.output / LOG, json.dumps(record))

    def save_checkpoint(self) -> None:
        state = {
            "config": asdict(self.config),
            "step": self.step,
            "seconds": self.seconds,
            "predictor": self.predictor.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        run_files.write_checkpoint(self.output / CHECKPOINT, state)

    def load_checkpoint(self) -> None:
        """Continue from the checkpoint; log lines past it (of a run that was killed) are dropped.

        Raises:
            ValueError: a checkpoint or log that cannot be read, or one of another configuration (the field is named).
        """
        path = self.output / CHECKPOINT
        state = run_files.read_checkpoint(path, asdict(self.config), self.device)
        run_files.restore(path, state, self.predictor, self.optimizer)
        self.step = state["step"]
        self.seconds = state["seconds"]
        run_files.cut_log(self.output / LOG, self.step)
