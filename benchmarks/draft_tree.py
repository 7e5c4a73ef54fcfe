"""`draft_tree`: best-first growth of the next tree, against the reference."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from benchmarks.case import Case, draft_inputs, num_bytes
from benchmarks.shapes import Grid
from firp_kernels.ops import draft_tree

WIDTH = 16


def following_inputs(make: Callable[[int], tuple], seed: int) -> tuple:
    """The same, with ranks of their own after each of the 16 best candidates of the depth above."""
    probabilities, candidates, *others = make(seed)
    probabilities, candidates = probabilities[..., :WIDTH].contiguous(), candidates[..., :WIDTH].contiguous()
    width, generator = candidates.shape[2], torch.Generator().manual_seed(seed)
    factors = torch.randn(*candidates.shape, width, generator=generator).exp().to(probabilities.device)
    rows = probabilities[:, :, None] * factors
    ranked = (rows / rows.sum(-1, keepdim=True)).sort(-1, descending=True)
    return ranked.values, candidates, *others, ranked.indices.to(torch.int32)


def cases(grid: Grid) -> Iterator[Case]:
    for tree in grid.trees:
        make = functools.partial(draft_inputs, tree, grid.shape.vocabulary, grid.device)
        sample = make(0)
        moved = num_bytes(*sample[:4], *draft_tree.reference(*sample))
        yield Case("draft_tree", "", grid.shape.name, tree, None, sample[0].dtype, make, moved)
        following = functools.partial(following_inputs, make)
        sample = following(0)
        moved = num_bytes(*sample[:4], sample[6], *draft_tree.reference(*sample))
        yield Case("draft_tree", "following", grid.shape.name, tree, None, sample[0].dtype, following, moved)
