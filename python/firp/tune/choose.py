"""Pick draft trees from step times and acceptance: pure functions over figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from firp.drafting.trees import TreeConfig

# Speeds closer than this are a tie, which goes to the tree with fewer rows.
TIE = 0.01
# A tree is not measured when even the least time it can take leaves it this far below the best seen.
HOPELESS = 0.85


@dataclass(frozen=True, order=True)
class Candidate:
    """A tree that may be chosen: N nodes, P lookahead nodes, k offsets, and its kind. N = 1 decodes plainly."""

    num_nodes: int
    num_lookahead: int
    num_offsets: int
    kind: str = "dynamic"

    @property
    def rows(self) -> int:
        """Rows above the insertion layer: N + P * k."""
        return 1 if self.num_nodes == 1 else self.num_nodes + self.num_lookahead * self.num_offsets

    @property
    def tree(self) -> TreeConfig:
        return TreeConfig(self.num_nodes, self.num_lookahead, self.kind)


def plain(num_offsets: int) -> Candidate:
    """Plain decoding, as a candidate."""
    return Candidate(1, 1, num_offsets)


@dataclass(frozen=True)
class Point:
    """A candidate with its figures for one batch size.

    Attributes:
        seconds: of one step. tau: tokens a step delivers to each sequence, in a batch until its slowest answer is done.
        batch_size: B.
    """

    candidate: Candidate
    seconds: float
    tau: float
    batch_size: int = 1

    @property
    def tokens_per_second(self) -> float:
        """B * tau / seconds."""
        return self.batch_size * self.tau / self.seconds


def candidates(
    nodes: Iterable[int], lookahead: Iterable[int], offsets: Iterable[int], kinds: Iterable[str]
) -> list[Candidate]:
    """Every combination with 1 < N and P <= N, and plain decoding first.

    Raises:
        ValueError: N, P or a kind out of range, naming it.
    """
    offsets = sorted(set(offsets))
    found = [plain(offsets[-1])]
    for num_nodes in sorted(set(nodes)):
        for num_lookahead in sorted(set(lookahead)):
            for kind in sorted(set(kinds)):
                TreeConfig(num_nodes, min(num_lookahead, num_nodes), kind)
                if num_lookahead < 1:
                    raise ValueError(f"num_lookahead: got {num_lookahead}, expected at least 1")
                if 1 < num_nodes >= num_lookahead:
                    found += [Candidate(num_nodes, num_lookahead, k, kind) for k in offsets]
    return found


def measure_grid(
    sizes: Iterable[tuple[int, int]], taus: dict[tuple[int, int], float], measure: Callable[[tuple[int, int]], float]
) -> dict[tuple[int, int], float]:
    """Step seconds of the sizes (N, P) that can still win, from the smallest on.

    A tree of more nodes and lookahead nodes takes no less time than a smaller one. With that least time and the best
    tau of its size, a tree that stays below `HOPELESS` times the best speed seen is left out.

    Args:
        taus: of each size, the best over kinds and offsets.
        measure: seconds of a step at one size.
    """
    seconds: dict[tuple[int, int], float] = {}
    best = 0.0
    for size in sorted(sizes):
        least = max((t for (n, p), t in seconds.items() if n <= size[0] and p <= size[1]), default=0.0)
        if least and taus[size] / least < HOPELESS * best:
            continue
        seconds[size] = measure(size)
        best = max(best, taus[size] / seconds[size])
    return seconds


def step_seconds(grid: dict[tuple[int, int], float], num_offsets: int, candidate: Candidate) -> float | None:
    """Step time of a candidate from times measured at `num_offsets`: linear in pseudo rows P * k at equal N.

    Fewer pseudo rows than the fewest measured cost as much as those; more than the most measured, or an N that was not
    measured, give None.
    """
    measured = sorted((p * num_offsets, seconds) for (n, p), seconds in grid.items() if n == candidate.num_nodes)
    if candidate.num_nodes == 1:
        return measured[0][1] if measured else None
    pseudo = candidate.num_lookahead * candidate.num_offsets
    if not measured or pseudo > measured[-1][0]:
        return None
    return float(np.interp(pseudo, *zip(*measured, strict=True)))


def choose(points: Iterable[Point], max_rows: int | None = None) -> Point:
    """The fastest point; among those within `TIE` of it the one with the fewest rows, plain decoding included.

    Args:
        points: of one batch size. max_rows: leave out candidates with more rows.

    Raises:
        ValueError: no points.
    """
    allowed = [point for point in points if max_rows is None or point.candidate.rows <= max_rows]
    if not allowed:
        raise ValueError("points: got none, expected at least plain decoding")
    best = max(point.tokens_per_second for point in allowed)
    tied = [point for point in allowed if point.tokens_per_second >= (1 - TIE) * best]
    return min(tied, key=lambda point: (point.candidate.rows, -point.tokens_per_second, point.candidate))


def choose_each(points: dict[int, list[Point]]) -> dict[int, Point]:
    """A choice for every batch size; a larger batch never gets more rows a sequence than a smaller one.

    More sequences make every further row cost more, so a larger tree there would only be noise.
    """
    chosen: dict[int, Point] = {}
    max_rows = None
    for batch_size in sorted(points):
        chosen[batch_size] = choose(points[batch_size], max_rows)
        max_rows = chosen[batch_size].candidate.rows
    return chosen


def choose_offsets(points: dict[int, list[Point]]) -> int:
    """One k for all batch sizes: the largest geometric mean of the best speeds, ties to the smaller k."""
    drafting = sorted(
        {point.candidate.num_offsets for part in points.values() for point in part if point.candidate.num_nodes > 1}
    )
    if not drafting:
        return max(point.candidate.num_offsets for part in points.values() for point in part)

    def score(k: int) -> float:
        best = [
            max(p.tokens_per_second for p in part if p.candidate.num_nodes == 1 or p.candidate.num_offsets == k)
            for part in points.values()
        ]
        return sum(map(math.log, best)) / len(best)

    scores = {k: score(k) for k in drafting}
    return min(k for k in drafting if scores[k] >= max(scores.values()) + math.log(1 - TIE))


def choose_head(seconds: dict[int, dict[str | None, float]]) -> str | None:
    """One head mode for all batch sizes: the least geometric mean of step times, ties to None, the engine's own rule.

    Args:
        seconds: by batch size, the step time of the chosen tree with each mode; None is one of them.
    """
    modes = set.intersection(*map(set, seconds.values())) if seconds else {None}
    mean = {mode: sum(math.log(part[mode]) for part in seconds.values()) for mode in modes}
    best = min(modes, key=lambda mode: (mean[mode], mode or ""))
    return None if mean[None] + len(seconds) * math.log(1 - TIE) <= mean[best] else best


def finalists(points: Iterable[Point], count: int) -> list[Candidate]:
    """Plain decoding, then the `count` fastest candidates of every k."""
    ranked = sorted(points, key=lambda point: (-point.tokens_per_second, point.candidate.rows, point.candidate))
    ordered = [point.candidate for point in ranked]
    last = [candidate for candidate in ordered if candidate.num_nodes == 1][:1]
    for k in sorted({candidate.num_offsets for candidate in ordered}):
        last += [candidate for candidate in ordered if candidate.num_nodes > 1 and candidate.num_offsets == k][:count]
    return last
