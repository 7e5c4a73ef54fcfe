"""Which tree an engine drafts for a batch: the one asked for, the predictor's own, or what pays on this machine."""

from __future__ import annotations

import threading

from firp.drafting.choices import Choice, Rung, best_rung, find_profile
from firp.drafting.lookup import MOST_BRANCH, host_adds_branches
from firp.drafting.predictor import FirpPredictor
from firp.drafting.trees import TreeConfig
from firp.engine.automatic import Automatic
from firp.engine.buffers import next_power_of_two
from firp.engine.graphs import StepRunner
from firp.engine.plans import MOST_ROWS
from firp.engine.step import Step
from firp.engine.steps import Steps


class TreeChoice:
    """Trees by batch size, all with the first k offsets of one predictor.

    Args:
        predictor: what drafts.
        tree: for every batch size; None chooses.
        steps: of the engine.
        runner: how the engine runs steps.
        times_steps: whether trees may be timed: figures are kept for the engine's usual steps alone.
    """

    def __init__(
        self,
        predictor: FirpPredictor,
        tree: TreeConfig | None,
        steps: Steps,
        runner: StepRunner,
        times_steps: bool,
    ) -> None:
        self.predictor, self.device, self.steps = predictor, steps.view.device, steps
        profile = find_profile(predictor) if tree is None and times_steps else None
        self.shrinks = tree is None
        self.tree = predictor.tree if tree is None and profile is None else tree
        self.automatic = None if profile is None else Automatic(predictor, profile, steps, runner)
        # Rows of a branch beside those of a tree; elsewhere it takes the place of nodes.
        self.branch_rows = MOST_BRANCH if host_adds_branches(self.device) else 0
        self.choice: Choice | None = None
        # The first calls of several threads have one choice, and one k.
        self._lock = threading.RLock()
        self._step: Step | None = None

    @property
    def num_offsets(self) -> int:
        """k. Where nothing was timed yet, steps of one sequence are."""
        return self.predictor.num_offsets if self.automatic is None else self._choose(1).num_offsets

    @property
    def step(self) -> Step:
        """The step that drafts the trees. One that was asked for, or all that were known at first, find room in it."""
        with self._lock:
            if self._step is None:
                self._step = self._make_step()
            return self._step

    def _make_step(self) -> Step:
        k = self.num_offsets
        if self.choice is None:
            assert self.tree is not None
            return self.steps.drafting(k, self.tree.num_nodes + self.tree.num_lookahead * k)
        kept = [rung.tree for rungs in self.choice.batches.values() for rung in rungs]
        rows = [tree.num_nodes + tree.num_lookahead * k for tree in kept]
        return self.steps.drafting(k, max(MOST_ROWS[self.device.type], *rows, 0) + self.branch_rows, self.choice.head)

    def rungs(self, batch_size: int) -> tuple[Rung, ...] | None:
        """Trees that a run of B sequences changes between, with their figures; None where the tree stays."""
        if self.automatic is None:
            return None
        rungs, k = self._choose(batch_size).rungs(batch_size) or (), self.num_offsets
        # Figures that another process kept since may be of larger trees than there is room for.
        most = self.step.max_rows - self.branch_rows
        return tuple(rung for rung in rungs if rung.tree.num_nodes + rung.tree.num_lookahead * k <= most)

    def of(self, batch_size: int) -> TreeConfig:
        """The tree that a run of B sequences begins with."""
        rungs = self.rungs(batch_size)
        if rungs is not None:
            return best_rung(rungs).tree
        assert self.tree is not None
        return self.tree.for_batch(batch_size) if self.shrinks else self.tree

    def trees(self, batch_size: int) -> list[TreeConfig]:
        """All that a run of B sequences may draft."""
        rungs = self.rungs(batch_size)
        return [self.of(batch_size)] if rungs is None else [rung.tree for rung in rungs]

    def largest(self, batch_size: int) -> TreeConfig:
        """The one of them with the most rows."""
        return max(self.trees(batch_size), key=lambda tree: tree.num_nodes + tree.num_lookahead * self.num_offsets)

    def prepare(self, batch_size: int) -> None:
        """Time steps of a batch that is about to run, where nothing is kept for its size.

        A batch that shrinks while it runs takes what is there for a larger one.
        """
        size = next_power_of_two(batch_size)
        with self._lock:
            if self.automatic is not None and (self.choice is None or not self.choice.holds(size)):
                found = self.automatic.choice(size)
                self.choice = found if self.choice is None else self.choice.with_batches(found)

    def _choose(self, batch_size: int) -> Choice:
        """What is kept for a batch of this size or a larger one; timed where nothing is. The first one sets k."""
        if self.choice is None or self.choice.rungs(batch_size) is None:
            self.prepare(batch_size)
        assert self.choice is not None
        return self.choice
