"""Which trees are worth timing as whole steps: those that the acceptance profile and the cost of rows put first."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from firp.drafting.predictor import FirpPredictor
from firp.drafting.profile import NODES, AcceptanceProfile, load_profile
from firp.drafting.trees import TreeConfig
from firp.engine.costs import Curves, StepClock
from firp.tools.ranks import Ranks

LOOKAHEAD = (1, 2, 4, 8, 16, 32, 64)
GPU_NODES = (4, 8, 16, 32, 64)
# Nodes of all sequences at most: their scores take memory.
GPU_NODES_TOGETHER = 512
# Rows of a step at most.
MOST_ROWS = {"cpu": 64, "cuda": 256}
# The best trees of up to two other k are timed too where their estimate is this near to the best. One more offset has
# to be this much faster, as more rows have for `firp tune`.
NEAR, FASTER, MOST_RIVALS = 0.9, 1.01, 2
# Seconds that numbers of rows are timed for, where a step is long.
ROWS_SECONDS = 1.0


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

    @property
    def seconds(self) -> list[float]:
        """Estimated, for plain decoding and for each tree."""
        return [estimate.seconds for estimate in self.expected]

    def first(self, number: int) -> Plan:
        """The best so many of its trees."""
        return Plan(self.num_offsets, self.trees[:number], self.expected[: 1 + number])


class Planner:
    """Plans for one predictor on one device.

    Args:
        predictor: what drafts. path: of the profile of what its drafts are worth.
        ranks: rank 0 reads the profile.
    """

    def __init__(self, predictor: FirpPredictor, path: Path, ranks: Ranks) -> None:
        self.predictor, self.path, self.ranks = predictor, path, ranks
        self._taus: dict[tuple[TreeConfig, int], float] = {}

    @functools.cached_property
    def profile(self) -> AcceptanceProfile:
        """Read where steps are timed, not at every start of an engine."""
        return self.ranks.first(lambda: load_profile(self.path))

    def tau(self, tree: TreeConfig, num_offsets: int) -> float:
        if (tree, num_offsets) not in self._taus:
            self._taus[tree, num_offsets] = self.profile.tau(tree, num_offsets)
        return self._taus[tree, num_offsets]

    def plans(self, clock: StepClock, offsets: list[int]) -> list[Plan]:
        """Trees worth timing as whole steps, the best k first."""
        if clock.device.type == "cpu":
            return self._estimate(clock, offsets)
        k = offsets[-1]
        most = min(MOST_ROWS["cuda"] // (1 + k), GPU_NODES_TOGETHER // clock.batch_size)
        return [Plan(k, [TreeConfig(nodes, nodes) for nodes in GPU_NODES if nodes <= most], [])]

    def _estimate(self, clock: StepClock, offsets: list[int]) -> list[Plan]:
        """`plans` by the cost of rows: the two best trees of a k, and the best of half and of more of their rows."""
        below = self.predictor.insertion_layer / self.predictor.num_layers
        largest = TreeConfig(NODES[-1], NODES[-1])
        most = {k: self.tau(largest, k) for k in offsets}
        found: dict[int, list[tuple[float, int, TreeConfig]]] = {}

        def hopeless(curves: Curves) -> bool:
            """Whether no tree with more rows can be the fastest."""
            best = 1 / (curves.layers[0] + curves.head[0])
            for k in offsets:
                found[k] = []
                for tree in trees_within(min(curves.rows[-1], MOST_ROWS["cpu"]), k):
                    seconds = curves.step(tree, k, below)
                    if most[k] / seconds > best:
                        found[k].append((self.tau(tree, k) / seconds, tree.num_nodes + tree.num_lookahead * k, tree))
                        best = max(best, found[k][-1][0])
            least = below * curves.layers[0] + (1 - below) * curves.layers[-1] + curves.head[0]
            return max(most.values()) / least < best

        curves = clock.curves(hopeless, ROWS_SECONDS)
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


def trees_within(most_rows: int, num_offsets: int) -> Iterator[TreeConfig]:
    """Dynamic trees of at most so many rows."""
    for nodes in NODES:
        for lookahead in LOOKAHEAD:
            if lookahead <= nodes and nodes + lookahead * num_offsets <= most_rows:
                yield TreeConfig(nodes, lookahead)
