"""The whole of `firp tune`: record acceptance, measure a grid, measure the finalists against each other, choose."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import mean

from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

import firp_kernels
from firp.decoder.view import DecoderView
from firp.drafting.choices import HEADS, PAYS, Choice, Rung
from firp.drafting.lookup import MOST_BRANCH
from firp.drafting.predictor import FirpPredictor
from firp.drafting.profile import slowest_tau
from firp.drafting.recording import Recording, record
from firp.drafting.transition import token_tables
from firp.drafting.trees import Drafter
from firp.engine.costs import StepClock
from firp.engine.engine import Engine
from firp.generation.batch import greedy_answers
from firp.tune.acceptance import Replay, replay
from firp.tune.choose import (
    Candidate,
    Point,
    candidates,
    choose_each,
    choose_head,
    choose_offsets,
    finalists,
    measure_grid,
    plain,
    step_seconds,
)
from firp.tune.cost import StepTime, check_context, measure_steps, num_steps

ANSWERS_AT_ONCE = 8
FINALISTS = 3


@dataclass(frozen=True)
class TuneConfig:
    """What is tried and how long it is measured.

    Attributes:
        batch_sizes: a tree is chosen for each.
        nodes, lookahead: N and P of the grid.
        kinds: of trees.
        offsets: k; empty takes 1 to the predictor's.
        max_new_tokens: tokens of an answer at most.
        context: tokens before a measured step; None takes the prompts' mean and half of the answers'.
        steps, repeats: steps of one timing, timings of each finalist.
    """

    batch_sizes: tuple[int, ...] = (1,)
    nodes: tuple[int, ...] = (2, 4, 6, 8, 12, 16, 24, 32, 48, 64)
    lookahead: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    kinds: tuple[str, ...] = ("dynamic", "static")
    offsets: tuple[int, ...] = ()
    max_new_tokens: int = 96
    context: int | None = None
    steps: int = 8
    repeats: int = 5

    def __post_init__(self) -> None:
        for name in ("batch_sizes", "nodes", "lookahead", "kinds"):
            if not getattr(self, name):
                raise ValueError(f"{name}: got none, expected at least one")
        for name in ("max_new_tokens", "steps", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if min(self.batch_sizes) < 1:
            raise ValueError(f"batch_sizes: got {min(self.batch_sizes)}, expected at least 1")


@dataclass
class Batch:
    """What was found for one batch size.

    Attributes:
        own: the predictor's own tree.
        grid: estimates of every candidate whose step time is known from the measured sizes.
        times: measured step times, of the grid's sizes and of the finalists.
        final: measured finalists, interleaved with plain decoding and the predictor's own tree.
        choice: the finalist that was chosen, once all batch sizes are measured.
        heads: measured step times of the chosen tree with each head mode; None is the engine's own rule.
        branches: what a branch of 1, 2, ... nodes adds to a step of a finalist, where it may be looked up.
    """

    own: Candidate
    grid: list[Point] = field(default_factory=list)
    times: dict[Candidate, StepTime] = field(default_factory=dict)
    final: list[Point] = field(default_factory=list)
    choice: Point | None = None
    heads: dict[str | None, StepTime] = field(default_factory=dict)
    branches: dict[Candidate, tuple[float, ...]] = field(default_factory=dict)

    @property
    def chosen(self) -> Point:
        if self.choice is None:
            raise RuntimeError("tuner: has not chosen yet, expected run() before")
        return self.choice

    def point(self, candidate: Candidate) -> Point:
        """The measured figures of a finalist."""
        return next(point for point in self.final if point.candidate == candidate)

    @property
    def plain(self) -> Point:
        return next(point for point in self.final if point.candidate.num_nodes == 1)


class Tuner:
    """Chooses trees for one model, predictor and machine.

    Args:
        model: the base model, where it will decode.
        predictor: trained for it.
        prompts: [T] int64 each; acceptance is measured on the model's answers to them.
        config: what to try.

    Raises:
        ValueError: a tree out of range, an offset the predictor does not have, no prompts, a predictor for another
            model (`PredictorMismatch`).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        predictor: FirpPredictor,
        prompts: list[Tensor],
        config: TuneConfig,
        progress: bool = True,
    ) -> None:
        predictor.check_model(model)
        if not prompts:
            raise ValueError("prompts: got none, expected at least one")
        self.model = model
        self.predictor = predictor
        self.prompts = prompts
        self.config = config
        self.progress = progress
        offsets = config.offsets or tuple(range(1, predictor.num_offsets + 1))
        for k in offsets:
            predictor.first_offsets(k)
        self.most_offsets = max(offsets)
        if config.context is not None:
            check_context(model, config.context, predictor.num_offsets, num_steps(config.steps, config.repeats))
        self.candidates = candidates(config.nodes, config.lookahead, offsets, config.kinds)
        self.own = {batch_size: self._own(batch_size) for batch_size in sorted(set(config.batch_sizes))}
        self.replays: dict[Candidate, Replay] = {}
        self.context = config.context or 0  # What the prompts have, once they are answered.
        self.num_offsets = self.most_offsets
        self.head: str | None = None
        self.answers: list[list[int]] = []
        self.batches: dict[int, Batch] = {}

    def _own(self, batch_size: int) -> Candidate:
        tree = self.predictor.tree.for_batch(batch_size)
        own = Candidate(tree.num_nodes, tree.num_lookahead, self.predictor.num_offsets, tree.kind)
        return plain(self.most_offsets) if own.num_nodes == 1 else own

    def run(self) -> None:
        """Fill `replays`, `batches`, `num_offsets` and `head`."""
        transition = token_tables(DecoderView(self.model), self.predictor.transition)
        recordings = self._record(transition)
        if transition is not None:  # Recordings are on the host, for any device of the model.
            transition = transition[0].cpu(), transition[1].cpu()
        for candidate in tqdm(
            [*dict.fromkeys([*self.candidates, *self.own.values()])], "replay", disable=None if self.progress else True
        ):
            self.replays[candidate] = replay(recordings, candidate.tree, candidate.num_offsets, transition)
        for batch_size, own in self.own.items():
            self.batches[batch_size] = Batch(own=own)
            self._estimate(batch_size)
            self._measure_finalists(batch_size)
        self.num_offsets = choose_offsets({size: batch.final for size, batch in self.batches.items()})
        chosen = choose_each({size: self._choosable(size) for size in self.batches})
        for batch_size, point in chosen.items():
            self.batches[batch_size].choice = point
        self._choose_head()
        for batch_size in self.batches:
            self._time_branches(batch_size)

    def _record(self, transition: tuple[Tensor, Tensor] | None) -> list[Recording]:
        ops = firp_kernels.bind(None)
        ranks = max(
            Drafter(c.tree, c.num_offsets, ops, transition).num_ranks for c in [*self.candidates, *self.own.values()]
        )
        engine, view = Engine(self.model), DecoderView(self.model)
        answers, recordings = [], []
        for start in tqdm(
            range(0, len(self.prompts), ANSWERS_AT_ONCE), "answers", disable=None if self.progress else True
        ):
            part = self.prompts[start : start + ANSWERS_AT_ONCE]
            answers += greedy_answers(engine, part, self.config.max_new_tokens, ANSWERS_AT_ONCE)
        self.answers = answers
        pairs = list(zip(self.prompts, answers, strict=True))
        for prompt, answer in tqdm(pairs, "marginals", disable=None if self.progress else True):
            recordings.append(record(view, self.predictor, prompt, answer, ranks))
        if self.config.context is None:
            self.context = round(mean(len(prompt) + len(answer) / 2 for prompt, answer in pairs))
        return recordings

    def _tau(self, candidate: Candidate, batch_size: int) -> float:
        """Tokens a step delivers to a sequence; in a batch until its slowest answer is done."""
        stats, paces = self.replays[candidate]
        return stats.tau if batch_size == 1 else slowest_tau(paces, batch_size)

    def _engine(self, candidate: Candidate, head: str | None = None) -> Engine:
        if candidate.num_nodes == 1:
            return Engine(self.model)
        return Engine(self.model, self.predictor.first_offsets(candidate.num_offsets), candidate.tree, head=head)

    def _estimate(self, batch_size: int) -> None:
        """Measure the grid's sizes at the most offsets, and estimate every candidate from them."""
        batch, k = self.batches[batch_size], self.most_offsets
        taus: dict[tuple[int, int], float] = {}
        for c in self.candidates:
            size = (c.num_nodes, c.num_lookahead)
            taus[size] = max(taus.get(size, 0.0), self._tau(c, batch_size))
        with tqdm(
            total=len(taus), desc=f"step times, batch {batch_size}", disable=None if self.progress else True
        ) as bar:

            def measure(size: tuple[int, int]) -> float:
                key = Candidate(*size, k)
                batch.times |= measure_steps(
                    {key: self._engine(key)}, self.context, batch_size, self.config.steps, min(3, self.config.repeats)
                )
                bar.update()
                # Sizes are measured one after another: the least repeat is what a busy moment of the machine spoils
                # least.
                return min(batch.times[key].repeats)

            seconds = measure_grid(taus, taus, measure)
        for candidate in self.candidates:
            estimate = step_seconds(seconds, k, candidate)
            if estimate is not None:
                batch.grid.append(Point(candidate, estimate, self._tau(candidate, batch_size), batch_size))

    def _choosable(self, batch_size: int) -> list[Point]:
        """Plain decoding and the finalists of the chosen k; in a batch those that pay."""
        batch = self.batches[batch_size]
        least = 0.0 if batch_size == 1 else PAYS * batch.plain.tokens_per_second
        drafting = [p for p in batch.final if p.candidate.num_nodes > 1 and p.tokens_per_second >= least]
        return [batch.plain, *(p for p in drafting if p.candidate.num_offsets == self.num_offsets)]

    def _measure_finalists(self, batch_size: int) -> None:
        batch = self.batches[batch_size]
        last = [*dict.fromkeys([*finalists(batch.grid, FINALISTS), batch.own])]
        times = measure_steps(
            {candidate: self._engine(candidate) for candidate in last},
            self.context, batch_size, self.config.steps, self.config.repeats,
        )  # fmt: skip
        batch.times |= times
        batch.final = [Point(c, time.seconds, self._tau(c, batch_size), batch_size) for c, time in times.items()]

    def _choose_head(self) -> None:
        """Measure the chosen trees with each head mode, and take the fastest mode. An update leaves one alone."""
        if self.predictor.update_width:
            return
        drafting = {size: batch for size, batch in self.batches.items() if batch.chosen.candidate.num_nodes > 1}
        for batch_size, batch in drafting.items():
            engines = {head: self._engine(batch.chosen.candidate, head) for head in (None, *HEADS)}
            batch.heads = measure_steps(engines, self.context, batch_size, self.config.steps, self.config.repeats)
        self.head = choose_head(
            {size: {h: t.seconds for h, t in batch.heads.items()} for size, batch in drafting.items()}
        )

    def _time_branches(self, batch_size: int) -> None:
        """Estimate what a branch adds to a step, from the times of layers and head at numbers of rows."""
        batch, predictor = self.batches[batch_size], self.predictor
        engine = Engine(self.model, predictor, predictor.tree, head=self.head)
        if engine.view.device.type != "cpu":
            return
        last = [point.candidate for point in self._choosable(batch_size)]
        most = max(candidate.rows for candidate in last) + MOST_BRANCH
        curves = StepClock(engine.steps, most, engine.runner, batch_size).curves(lambda known: known.rows[-1] >= most)
        for c in last:
            batch.branches[c] = curves.branch(c.tree, c.num_offsets, predictor.insertion_layer / predictor.num_layers)

    def choice(self) -> Choice:
        """What engines take from here: by batch size, plain decoding and the measured trees of the chosen k, in a batch
        those that pay."""
        batches = {}
        for batch_size, batch in self.batches.items():
            drafting = self._choosable(batch_size)[1:]
            points = [batch.plain, *sorted(drafting, key=lambda point: point.seconds)]
            batches[batch_size] = tuple(
                Rung(p.candidate.tree, p.seconds, self._tau(p.candidate, 1), batch.branches.get(p.candidate, ()))
                for p in points
            )
        return Choice(self.num_offsets, self.head, batches, "firp tune")
