"""`lookup_branch`: the longest earlier match of the last tokens, and what followed it as a branch, against torch."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from benchmarks.case import Alternative, Case, drafted, integers, num_bytes
from benchmarks.shapes import Grid, Tree
from firp_kernels.ops import lookup_branch

# Texts of so few different tokens repeat themselves.
DIFFERENT, NODES, LEAST_MATCH, MOST_MATCH = 8, 8, 2, 8


def cases(grid: Grid) -> Iterator[Case]:
    for tree in grid.trees:
        for context in grid.contexts:

            def make(seed: int, tree: Tree = tree, context: int = context) -> tuple:
                tokens, parents, depths, ancestors, _ = drafted(tree, grid.shape.vocabulary, grid.device, seed)
                generator = torch.Generator().manual_seed(seed)
                text = torch.randint(DIFFERENT, (1, context + 1), generator=generator).to(grid.device)
                emitted, count = text[:, -1:].clone(), torch.ones(1, dtype=torch.int64, device=grid.device)
                nodes = tokens, parents, depths, ancestors
                sizes = NODES, LEAST_MATCH, MOST_MATCH
                return text, integers(grid.device, context), emitted, count, *nodes, *sizes

            sample = make(0)
            moved = num_bytes(*sample[:8], *lookup_branch.reference(*sample))
            yield Case(
                "lookup_branch", "", grid.shape.name, tree, context, torch.int64, make, moved,
                alternatives={"torch": Alternative(lambda args: functools.partial(lookup_branch.reference, *args))},
            )  # fmt: skip
