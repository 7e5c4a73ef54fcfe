"""What a decode step costs on this machine, measured in a few seconds at first use.

On a CPU the layers are timed at a few numbers of rows, and so is the head: a step of N nodes and P * k pseudo rows
takes the lower layers at N rows, the upper ones at N + P * k, and the head. The trees that this estimate ranks first
are then timed as whole steps beside plain decoding, and both count. On a GPU, where a step is a captured graph, whole
steps of trees of a few sizes are timed at once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from firp.drafting.lookup import MOST_BRANCH
from firp.drafting.trees import MAX_NODES, DraftTree, TreeConfig, root_only
from firp.engine.buffers import SMALLEST_BUCKET, Buffers
from firp.engine.chooser import Greedy
from firp.engine.graphs import StepRunner, drafted_size
from firp.engine.rows import SHARED_PSEUDO_ROWS
from firp.engine.state import DecodeState
from firp.engine.step import Step
from firp.engine.steps import Steps
from firp.tools.hardware import synchronize

# Tokens before a measured step, a short prompt with half of its answer: rows cost more with more to attend to.
CONTEXT, SPARE_SLOTS = 160, 64
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
# Where all of them would take too long.
FEW_ROWS = (1, 4, 16, 64)
SWEEPS, SWEEP_SECONDS = 4, 0.6
STEPS, STEP_SECONDS = 9, 0.8
# Turns that do not count: the first verifies roots alone. Captures are made in them.
WARM_UP_STEPS = {"cpu": 1, "cuda": 2}


@dataclass(frozen=True)
class Curves:
    """Seconds at each number of rows of a sequence.

    Attributes:
        rows: increasing.
        layers: seconds of all layers. head: of the head.
        apart: the share of the head that pseudo rows always pass after the nodes; None where few share their pass.
    """

    rows: tuple[int, ...]
    layers: tuple[float, ...]
    head: tuple[float, ...]
    apart: float | None = None

    def step(self, tree: TreeConfig, num_offsets: int, below: float, branch: int = 0) -> float:
        """Seconds of a step, by interpolation between the rows. A tree of one node decodes plainly.

        Args:
            below: share of the layers that are below the insertion layer.
            branch: nodes that are added to the tree.
        """
        nodes, pseudo = tree.num_nodes + branch, tree.num_lookahead * num_offsets if tree.num_nodes > 1 else 0
        layers = below * self._at(self.layers, nodes) + (1 - below) * self._at(self.layers, nodes + pseudo)
        if not pseudo or (pseudo <= SHARED_PSEUDO_ROWS and self.apart is None):
            return layers + self._at(self.head, nodes + pseudo)
        share = 1.0 if self.apart is None else self.apart
        return layers + self._at(self.head, nodes) + share * self._at(self.head, num_offsets)

    def branch(self, tree: TreeConfig, num_offsets: int, below: float) -> tuple[float, ...]:
        """Seconds that a branch of 1, 2, ... nodes adds to a step."""
        most = min(MOST_BRANCH, MAX_NODES - tree.num_nodes)
        steps = [self.step(tree, num_offsets, below, more) for more in range(most + 1)]
        return tuple(max(seconds - steps[0], 0.0) for seconds in steps[1:])

    def every(self, rows: int) -> float:
        """Seconds of so many rows through all layers and the head."""
        return self._at(self.layers, rows) + self._at(self.head, rows)

    def _at(self, seconds: tuple[float, ...], rows: int) -> float:
        """Beyond the most rows that were timed, each takes what one did on average."""
        beyond = max(rows - self.rows[-1], 0)
        average = (seconds[-1] - seconds[0]) / max(self.rows[-1] - self.rows[0], 1)
        return float(np.interp(rows, self.rows, seconds) + beyond * average)


class StepClock:
    """Times steps of B sequences over a cache of zeros.

    Args:
        steps: of the engine. max_rows: rows of a sequence in a step at most.
        runner: how the engine runs steps.
        progress: called after each timing.
    """

    def __init__(
        self,
        steps: Steps,
        max_rows: int,
        runner: StepRunner,
        batch_size: int,
        progress: Callable[[], object] = lambda: None,
    ) -> None:
        self.steps, self.max_rows = steps, max_rows
        self.runner, self.batch_size, self.progress = runner, batch_size, progress
        view = steps.view
        self.view, self.device = view, view.device
        _, kv_heads, width = view.heads
        # Every step starts from the same context.
        slots = max(SMALLEST_BUCKET, CONTEXT + max(max(ROWS), max_rows) + SPARE_SLOTS)
        self.buffers = Buffers.allocate(view.num_layers, batch_size, slots, kv_heads, width, view.dtype, view.device)
        self.buffers.cache.zero_()
        self.buffers.addresses = view.addresses() if runner.captures else ()

    def state(self, step: Step, tree: TreeConfig | None = None) -> DecodeState:
        """A run before its first step, which drafts `tree`; None decodes plainly."""
        buffers, size = self.buffers, self.batch_size
        drafter = None if tree is None or step.drafters is None else step.drafters.of(tree)
        roots = torch.zeros(size, dtype=torch.int64, device=self.device)
        return DecodeState(
            buffers=buffers,
            cache=buffers.cache,
            context_lens=buffers.context_lens.fill_(CONTEXT),
            tree=root_only(roots, int(drafter is not None)),
            sequence=buffers.sequence.copy_(torch.arange(size)),
            finished=buffers.finished.fill_(False),
            remaining=buffers.remaining.fill_(1 << 40),
            seed=buffers.seed.fill_(0),
            stop_tokens=buffers.set_stop_tokens([]),
            lengths=[CONTEXT] * size,
            drafter=drafter,
            history=buffers.history if step.keeps_size else None,
        )

    def curves(self, hopeless: Callable[[Curves], bool], most_seconds: float = math.inf) -> Curves:
        """Layers and head at growing numbers of rows, until `hopeless` says that no more can pay.

        Rows are timed in sweeps, so that all meet the same moments of the machine; the least time of each counts.

        Args:
            most_seconds: rows that may take longer than this together are left out; two numbers of them are timed.
        """
        step = self.steps.drafting(1, self.max_rows)
        state = self.state(step)
        one = min(sum(self._rows(step, state, 1)) for _ in range(2))
        # More rows take longer, some of them several times as long.
        numbers = ROWS if 2 * len(ROWS) * one < most_seconds else FEW_ROWS
        least: dict[int, list[float]] = {}
        started = time.perf_counter()

        def take(rows: int) -> Curves:
            taken = self._rows(step, state, rows)
            least[rows] = [min(pair) for pair in zip(taken, least.get(rows, taken), strict=True)]
            self.progress()
            return self._curves(least)

        for rows in numbers:
            if len(least) > 1 and self._since(started) + self._curves(least).every(rows) > most_seconds:
                break
            curves = take(rows)
            # One slow moment must not end it: the same rows again.
            if hopeless(curves) and (self._since(started) + curves.every(rows) > most_seconds or hopeless(take(rows))):
                break
        for rows in tuple(least) * (SWEEPS - 1):
            if self._since(started) > SWEEP_SECONDS:
                break
            take(rows)
        return self._curves(least)

    def _curves(self, least: dict[int, list[float]]) -> Curves:
        layers, head = (tuple(times) for times in zip(*least.values(), strict=True))
        predictor, apart = self.steps.predictor, None
        if predictor is not None and predictor.update_width:
            apart = (predictor.draft_vocabulary or predictor.vocab_size) / predictor.vocab_size
        return Curves(tuple(least), tuple(np.maximum.accumulate(layers)), tuple(np.maximum.accumulate(head)), apart)

    def _rows(self, step: Step, state: DecodeState, rows: int) -> list[float]:
        """Seconds of all layers and of the head at a number of rows."""
        roots = torch.zeros(self.batch_size, dtype=torch.int64, device=self.device)
        state.tree = root_only(roots, 0).padded(rows, 0)
        begin = time.perf_counter()
        hidden = step.forward(state)
        between = time.perf_counter()
        self.view.logits(hidden)
        taken = [between - begin, time.perf_counter() - between]
        return self.view.ranks.first(lambda: taken)

    def _since(self, begin: float) -> float:
        """Seconds since then, of rank 0: every rank times and stops alike."""
        taken = time.perf_counter() - begin
        return self.view.ranks.first(lambda: taken)

    def seconds(self, trees: list[tuple[TreeConfig | None, int]]) -> list[float]:
        """Seconds of a step of each tree (None: plain decoding) with k offsets, taken in turns."""
        choose = Greedy(self.steps.ops)
        taken: list[list[float]] = []
        warm_up = WARM_UP_STEPS[self.device.type]
        drafted: list[DraftTree | None] = [None for _ in trees]
        started = time.perf_counter()
        for turn in range(warm_up + STEPS):
            taken.append([])
            for i, (tree, num_offsets) in enumerate(trees):
                step = self.steps.drafting(num_offsets, self.max_rows)
                state = self.state(step, tree)
                state.use_slots(CONTEXT + step.most_tokens(state) + step.rows(*drafted_size(state)))
                state.tree = drafted[i] or state.tree
                synchronize(self.device)
                begin = time.perf_counter()
                self.runner.step(step, state, choose)
                synchronize(self.device)
                taken[-1].append(self._since(begin))
                drafted[i] = state.tree
                self.progress()
            if turn >= warm_up and self._since(started) > STEP_SECONDS:
                break
        return typical(np.array(taken[warm_up:])).tolist()


def typical(taken: np.ndarray) -> np.ndarray:
    """What each of n steps takes, from turns of all n, [T, n] to [n].

    The machine's own speed moves from turn to turn. So a step counts by its share of its turn: the median of these,
    times the median turn.
    """
    pace = np.exp(np.log(taken).mean(1, keepdims=True))
    return np.median(taken / pace, axis=0) * np.median(pace)


def fitting(seconds: list[float], left: float) -> int:
    """How many of these steps, from the first on, can be timed on a CPU in the seconds that are left."""
    return sum((WARM_UP_STEPS["cpu"] + 1) * together <= left for together in accumulate(seconds))
