"""Which trees an engine drafts where none was asked for: those kept for this machine, or measured at first use."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from tqdm import tqdm

from firp.decoder.modes import plain_tensors
from firp.drafting.choices import PAYS, Choice, Rung, add_batches, choice_file, load_choice
from firp.drafting.predictor import FirpPredictor
from firp.drafting.trees import TreeConfig
from firp.engine.costs import StepClock, fitting
from firp.engine.graphs import StepRunner
from firp.engine.plans import FASTER, MOST_ROWS, Plan, Planner
from firp.engine.steps import Steps
from firp.tools.hardware import machine_name, preemptions

# Estimates and timed steps differ by at most this factor, or all is timed again where a call may still wait for it.
STEADY, ATTEMPTS = 1.5, 3
# An estimate moves a timed step by at most this factor: it may be wrong for the rows of one tree.
TRUSTED = 1.05
MOST_SECONDS = {"cpu": 3.0, "cuda": 60.0}
# Preemptions of a thread in a second at most: 15 on an idle machine, 130 where another process wants the same cores.
PREEMPTIONS = 60

# What is not in the cache folder: it cannot be written, or the machine was busy. It lasts as long as the process.
_measured: dict[tuple[str, str], Choice] = {}


class Measured(NamedTuple):
    """What was timed for a batch size.

    Attributes:
        num_offsets: k.
        rungs: plain decoding first.
        steady: whole steps took what the rows let expect, within `STEADY`, and no other process wanted the cores.
    """

    num_offsets: int
    rungs: tuple[Rung, ...]
    steady: bool


class Automatic:
    """Finds the trees of one engine, batch size by batch size.

    Args:
        predictor: what drafts. profile: the file of what its drafts are worth.
        steps: of the engine.
        runner: how the engine runs steps.
    """

    def __init__(
        self,
        predictor: FirpPredictor,
        profile: Path,
        steps: Steps,
        runner: StepRunner,
    ) -> None:
        self.predictor, self.steps, self.runner = predictor, steps, runner
        view = steps.view
        self.device, self.ranks = view.device, view.ranks
        self.planner = Planner(predictor, profile, view.ranks)
        self.machine = ", ".join([machine_name(view.device, view.dtype), *_setting(steps, runner)])

    @plain_tensors
    def choice(self, batch_size: int) -> Choice:
        """What is kept for this machine; measured, and kept, where it does not hold this batch size.

        Rank 0 reads and writes the cache folder, and its times count on every rank.
        """
        path = self.ranks.first(self._path)
        kept, key = self.ranks.first(lambda: self._kept(path)), (self.predictor.fingerprint(), self.machine)
        if kept is not None and kept.holds(batch_size):
            return kept
        measured = self._measure(batch_size, kept.num_offsets if kept else None, path)
        found = Choice(measured.num_offsets, None, {batch_size: measured.rungs}, "first use")
        if not measured.steady or not self.ranks.first(lambda: _kept_in(path, self.machine, found)):
            _measured[key] = found.with_batches(_measured[key]) if key in _measured else found
        return found if kept is None else kept.with_batches(found)

    def _path(self) -> Path | None:
        try:
            return choice_file(self.predictor)
        except FileNotFoundError:
            return None

    def _kept(self, path: Path | None) -> Choice | None:
        """What the cache folder holds, and what this process measured beside it."""
        kept, own = self._load(path), _measured.get((self.predictor.fingerprint(), self.machine))
        if kept is None or own is None:
            return kept or own
        return kept.with_batches(own) if kept.num_offsets == own.num_offsets else kept

    def _load(self, path: Path | None) -> Choice | None:
        try:
            kept = None if path is None else load_choice(path, self.machine)
            if kept is not None and kept.num_offsets > self.predictor.num_offsets:
                raise ValueError(
                    f"{path}: num_offsets: got {kept.num_offsets}, expected at most {self.predictor.num_offsets}"
                )
        except ValueError as error:
            print(f"firp: {error}; measuring again", file=sys.stderr)
            return None
        return kept

    def _measure(self, batch_size: int, num_offsets: int | None, path: Path | None) -> Measured:
        """Time a batch size, again where the machine was not steady."""
        where = f", kept in {path.parent}" if path else ""
        self._say(f"timing decode steps of {batch_size} sequences on this machine, once{where}")
        began, before = time.perf_counter(), preemptions()
        most = MOST_SECONDS[self.device.type]

        def left() -> float:
            return self.ranks.first(lambda: most - (time.perf_counter() - began))

        offsets = [num_offsets] if num_offsets else list(range(1, self.predictor.num_offsets + 1))
        with tqdm(
            desc="timing steps", unit="timing", delay=1.0, leave=False, disable=None if self.ranks.leads else True
        ) as bar:
            clock = StepClock(self.steps, MOST_ROWS[self.device.type], self.runner, batch_size, bar.update)
            for attempt in range(1, ATTEMPTS + 1):
                plan, plain, seconds = self._time(clock, offsets, left)
                pairs = zip(plan.expected, [plain, *seconds], strict=False)
                steady = all(1 / STEADY < estimate.seconds / t < STEADY for estimate, t in pairs)
                if steady or (most - left()) / attempt > left():
                    break
        rate = (preemptions() - before) / (time.perf_counter() - began) / torch.get_num_threads()
        steady = self.ranks.first(lambda: steady and rate < PREEMPTIONS)
        if not steady:
            self._say("the machine is busy: these figures are for this process alone")
        k, branches = plan.num_offsets, [estimate.branch for estimate in plan.expected] or [()] * (1 + len(plan.trees))
        rungs = [
            Rung(tree, taken, self.planner.tau(tree, k), branch)
            for tree, taken, branch in zip(plan.trees, smoothed(seconds, plan.seconds[1:]), branches[1:], strict=True)
        ]
        rungs.sort(key=lambda rung: rung.seconds)
        # A tree that takes longer than one which delivers as much is never the best.
        useful = [rung for i, rung in enumerate(rungs) if all(rung.tau > cheaper.tau for cheaper in rungs[:i])]
        if batch_size > 1:
            useful = [rung for rung in useful if self._pays(rung, k, batch_size, plain)]
        return Measured(k, (Rung(TreeConfig(1, 1), plain, 1.0, branches[0]), *useful), steady)

    def _pays(self, rung: Rung, num_offsets: int, batch_size: int, plain: float) -> bool:
        """Whether a batch is done sooner with a tree than by plain steps, its slowest answer the last."""
        return self.planner.profile.batch_tau(rung.tree, num_offsets, batch_size) / rung.seconds >= PAYS / plain

    def _say(self, text: str) -> None:
        if self.ranks.leads:
            print(f"firp: {text}", file=sys.stderr)

    def _time(self, clock: StepClock, offsets: list[int], left: Callable[[], float]) -> tuple[Plan, float, list[float]]:
        """The plan whose best tree is the fastest, seconds of plain decoding, and seconds of its trees.

        Args:
            left: seconds that this may still take; steps that do not fit are left out, or estimated.
        """
        first, *others = self.planner.plans(clock, offsets)
        asked = len(first.timed) + len(others)
        estimates = [*first.seconds, *(plan.seconds[1] for plan in others)]
        fit = fitting(estimates, left()) if estimates else asked
        if fit < min(2, asked):
            plain = clock.seconds(first.timed[:1])[0] if fit else first.seconds[0]
            return first, plain, [seconds * plain / first.seconds[0] for seconds in first.seconds[1:]]
        others, first = others[: max(fit - len(first.timed), 0)], first.first(fit - 1)
        rivals = [(plan.trees[0], plan.num_offsets) for plan in others]
        plain, *seconds = clock.seconds([*first.timed, *rivals])
        timed = [(tree, first.num_offsets) for tree in first.trees] + rivals
        expected = [*first.seconds[1:], *(plan.seconds[1] for plan in others)]
        likely = smoothed(seconds, expected)
        worth = [self.planner.tau(tree, k) / taken / FASTER**k for (tree, k), taken in zip(timed, likely, strict=True)]
        best, own = worth.index(max(worth)) if worth else 0, len(first.trees)
        plan = first if best < own or not worth else others[best - own]
        if fitting(plan.seconds, left()) < len(plan.seconds):
            return (first, plain, seconds[:own]) if plan is first else (plan.first(1), plain, [seconds[best]])
        # Once more, or for the first time, without those of another k.
        again = clock.seconds(plan.timed)
        if plan is first:
            again = [(one * other) ** 0.5 for one, other in zip([plain, *seconds], again, strict=False)]
        return plan, again[0], again[1:]


def smoothed(timed: list[float], expected: list[float]) -> list[float]:
    """Seconds of trees, half by what was timed of each and half by what its rows let expect, but within `TRUSTED` of
    what was timed; the timed ones alone where nothing was expected.

    Few steps of a tree can be timed, and a slow moment of the machine meets some trees more than others. What all took
    against what was expected says how much a whole step adds.
    """
    if not timed or not expected:
        return timed
    pace = median(one / other for one, other in zip(timed, expected, strict=True))
    moved = ((pace * other / one) ** 0.5 for one, other in zip(timed, expected, strict=True))
    return [one * min(max(factor, 1 / TRUSTED), TRUSTED) for one, factor in zip(timed, moved, strict=True)]


def _kept_in(path: Path | None, machine: str, found: Choice) -> bool:
    """Whether there is a file that could take them."""
    if path is None:
        return False
    try:
        add_batches(path, machine, found)
    except OSError:
        return False
    return True


def _setting(steps: Steps, runner: StepRunner) -> list[str]:
    """What else a step's time depends on: captures, compiled layers, the head's mode, linears of another kind."""
    modules = [module for layer in steps.view.layers for module in layer.modules()]
    kinds = {type(module).__name__ for module in modules if hasattr(module, "in_features")}
    told = {"captured": runner.captures, "compiled": steps.layer.compiled}
    head = [] if steps.head is None else [f"head {steps.head}"]
    ranks = [f"{steps.view.ranks.size} ranks"] if steps.view.ranks.size > 1 else []
    return [name for name, on in told.items() if on] + head + ranks + sorted(kinds - {"Linear"})
