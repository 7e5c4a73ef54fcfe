"""Which trees an engine drafts where none was asked for: those kept for this machine, or measured at first use."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from firp.decoder.modes import plain_tensors
from firp.drafting.choices import PAYS, Choice, Rung, add_batches, choice_file, load_choice
from firp.drafting.predictor import FirpPredictor
from firp.drafting.profile import NODES, AcceptanceProfile, load_profile
from firp.drafting.trees import TreeConfig
from firp.engine.costs import Curves, StepClock
from firp.engine.graphs import StepRunner
from firp.engine.steps import Steps
from firp.tools.hardware import machine_name, preemptions

LOOKAHEAD = (1, 2, 4, 8, 16, 32, 64)
GPU_NODES = (4, 8, 16, 32, 64)
# Nodes of all sequences at most: their scores take memory.
GPU_NODES_TOGETHER = 512
# Rows of a step at most.
MOST_ROWS = {"cpu": 64, "cuda": 256}
# Estimates and timed steps differ by at most this factor, or all is timed again where a call may still wait for it.
STEADY, ATTEMPTS = 1.5, 3
MOST_SECONDS = {"cpu": 3.0, "cuda": 60.0}
# The best trees of up to two other k are timed too where their estimate is this near to the best. One more offset has
# to be this much faster: its steps take longer, and lose more where a text is harder than the profile's.
NEAR, FASTER, MOST_RIVALS = 0.9, 1.03, 2
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


class Estimate(NamedTuple):
    """Seconds of a step by the cost of rows, and what a branch of 1, 2, ... nodes adds to it."""

    seconds: float
    branch: tuple[float, ...]


class Plan(NamedTuple):
    """Trees of one k that are worth timing as whole steps.

    Attributes:
        num_offsets: k.
        trees: the best by the estimates first.
        expected: estimates for plain decoding and for each tree; empty where there are none.
    """

    num_offsets: int
    trees: list[TreeConfig]
    expected: list[Estimate]

    @property
    def timed(self) -> list[tuple[TreeConfig | None, int]]:
        """Plain decoding and the trees, as `StepClock.seconds` takes them."""
        return [(tree, self.num_offsets) for tree in (None, *self.trees)]


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
        self.predictor, self.profile_path, self.steps, self.runner = predictor, profile, steps, runner
        view = steps.view
        self.device, self.ranks = view.device, view.ranks
        self._taus: dict[tuple[TreeConfig, int], float] = {}
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
        offsets = [num_offsets] if num_offsets else list(range(1, self.predictor.num_offsets + 1))
        with tqdm(
            desc="timing steps", unit="timing", delay=1.0, leave=False, disable=None if self.ranks.leads else True
        ) as bar:
            clock = StepClock(self.steps, MOST_ROWS[self.device.type], self.runner, batch_size, bar.update)
            for attempt in range(1, ATTEMPTS + 1):
                plan, plain, seconds = self._time(clock, offsets)
                pairs = zip(plan.expected, [plain, *seconds], strict=False)
                steady = all(1 / STEADY < estimate.seconds / t < STEADY for estimate, t in pairs)
                waited = self.ranks.first(lambda: time.perf_counter() - began)
                if steady or waited / attempt * (attempt + 1) > MOST_SECONDS[self.device.type]:
                    break
        rate = (preemptions() - before) / (time.perf_counter() - began) / torch.get_num_threads()
        steady = self.ranks.first(lambda: steady and rate < PREEMPTIONS)
        if not steady:
            self._say("the machine is busy: these figures are for this process alone")
        k, branches = plan.num_offsets, [estimate.branch for estimate in plan.expected] or [()] * (1 + len(plan.trees))
        rungs = [
            Rung(tree, taken, self._tau(tree, k), branch)
            for tree, taken, branch in zip(plan.trees, seconds, branches[1:], strict=True)
        ]
        rungs.sort(key=lambda rung: rung.seconds)
        # A tree that takes longer than one which delivers as much is never the best.
        useful = [rung for i, rung in enumerate(rungs) if all(rung.tau > cheaper.tau for cheaper in rungs[:i])]
        if batch_size > 1:
            useful = [rung for rung in useful if self._pays(rung, k, batch_size, plain)]
        return Measured(k, (Rung(TreeConfig(1, 1), plain, 1.0, branches[0]), *useful), steady)

    def _pays(self, rung: Rung, num_offsets: int, batch_size: int, plain: float) -> bool:
        """Whether a batch is done sooner with a tree than by plain steps, its slowest answer the last."""
        return self.profile.batch_tau(rung.tree, num_offsets, batch_size) / rung.seconds >= PAYS / plain

    def _say(self, text: str) -> None:
        if self.ranks.leads:
            print(f"firp: {text}", file=sys.stderr)

    def _time(self, clock: StepClock, offsets: list[int]) -> tuple[Plan, float, list[float]]:
        """The plan whose best tree is the fastest, seconds of plain decoding, and seconds of its trees."""
        first, *others = self._plans(clock, offsets)
        rivals = [(plan.trees[0], plan.num_offsets) for plan in others]
        plain, *seconds = clock.seconds([*first.timed, *rivals])
        timed = [(tree, first.num_offsets) for tree in first.trees] + rivals
        worth = [self._tau(tree, k) / taken / FASTER**k for (tree, k), taken in zip(timed, seconds, strict=True)]
        best = worth.index(max(worth)) - len(first.trees) if worth else -1
        plan = first if best < 0 else others[best]
        # Once more, or for the first time, without those of another k.
        again = clock.seconds(plan.timed)
        if plan is first:
            again = [(one * other) ** 0.5 for one, other in zip([plain, *seconds], again, strict=False)]
        return plan, again[0], again[1:]

    def _plans(self, clock: StepClock, offsets: list[int]) -> list[Plan]:
        """Trees worth timing as whole steps, the best k first."""
        if self.device.type == "cpu":
            return self._estimate(clock, offsets)
        k = offsets[-1]
        most = min(MOST_ROWS["cuda"] // (1 + k), GPU_NODES_TOGETHER // clock.batch_size)
        return [Plan(k, [TreeConfig(nodes, nodes) for nodes in GPU_NODES if nodes <= most], [])]

    @functools.cached_property
    def profile(self) -> AcceptanceProfile:
        """Read where steps are timed, not at every start of an engine."""
        return self.ranks.first(lambda: load_profile(self.profile_path))

    def _tau(self, tree: TreeConfig, num_offsets: int) -> float:
        if (tree, num_offsets) not in self._taus:
            self._taus[tree, num_offsets] = self.profile.tau(tree, num_offsets)
        return self._taus[tree, num_offsets]

    def _estimate(self, clock: StepClock, offsets: list[int]) -> list[Plan]:
        """`_plans` by the cost of rows: the two best trees of a k, and the best of half and of more of their rows."""
        below = self.predictor.insertion_layer / self.predictor.num_layers
        largest = TreeConfig(NODES[-1], NODES[-1])
        most = {k: self._tau(largest, k) for k in offsets}
        found: dict[int, list[tuple[float, int, TreeConfig]]] = {}

        def hopeless(curves: Curves) -> bool:
            """Whether no tree with more rows can be the fastest."""
            best = 1 / (curves.layers[0] + curves.head[0])
            for k in offsets:
                found[k] = []
                for tree in trees_within(min(curves.rows[-1], MOST_ROWS["cpu"]), k):
                    seconds = curves.step(tree, k, below)
                    if most[k] / seconds > best:
                        found[k].append((self._tau(tree, k) / seconds, tree.num_nodes + tree.num_lookahead * k, tree))
                        best = max(best, found[k][-1][0])
            least = below * curves.layers[0] + (1 - below) * curves.layers[-1] + curves.head[0]
            return max(most.values()) / least < best

        curves = clock.curves(hopeless)
        hopeless(curves)
        ranked = {k: sorted(found[k], key=lambda entry: entry[:2], reverse=True) for k in offsets}
        worth = {k: ranked[k][0][0] / FASTER**k if ranked[k] else 0.0 for k in offsets}
        order = sorted(offsets, key=lambda k: worth[k], reverse=True)
        near = [k for k in order[1:] if ranked[k] and worth[k] >= NEAR * worth[order[0]]]
        plans = []
        for k in (order[0], *near[:MOST_RIVALS]):
            rows = ranked[k][0][1] if ranked[k] else 0
            smaller = [entry for entry in ranked[k] if entry[1] <= rows / 2][:1]
            larger = [entry for entry in ranked[k] if entry[1] >= 1.5 * rows][:1]
            trees = list(dict.fromkeys(tree for _, _, tree in (*ranked[k][:2], *smaller, *larger)))
            sizes = [(tree, k, below) for tree in (TreeConfig(1, 1), *trees)]
            plans.append(Plan(k, trees, [Estimate(curves.step(*size), curves.branch(*size)) for size in sizes]))
        return plans


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


def trees_within(most_rows: int, num_offsets: int) -> Iterator[TreeConfig]:
    """Dynamic trees of at most so many rows."""
    for nodes in NODES:
        for lookahead in LOOKAHEAD:
            if lookahead <= nodes and nodes + lookahead * num_offsets <= most_rows:
                yield TreeConfig(nodes, lookahead)
