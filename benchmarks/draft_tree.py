"""`draft_tree`: best-first growth of the next tree, against the reference."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from benchmarks.case import Case, draft_inputs, num_bytes
from benchmarks.shapes import Grid
from firp_kernels import reference


def cases(grid: Grid) -> Iterator[Case]:
    for tree in grid.trees:
        make = functools.partial(draft_inputs, tree, grid.shape.vocabulary, grid.device)
        sample = make(0)
        moved = num_bytes(*sample[:4], *reference.draft_tree(*sample))
        yield Case("draft_tree", "", grid.shape.name, tree, None, sample[0].dtype, make, moved)
