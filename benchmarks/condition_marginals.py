"""`condition_marginals`: marginals conditioned on the previous token, against gathers, products and topk of torch."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.case import Alternative, Case, normal
from benchmarks.shapes import Grid

RANKS, WIDTH = 16, 64


def in_torch(
    probabilities: Tensor, candidates: Tensor, root_token: Tensor, source: Tensor, target: Tensor, num_ranks: int
) -> tuple[Tensor, Tensor]:
    """For positive probabilities and finite factors."""
    previous = torch.cat([root_token[:, None, None].expand(-1, 1, candidates.shape[2]), candidates[:, :-1]], 1)
    factor = source[previous].float() @ target[candidates].float().mT
    after = torch.softmax(probabilities.log()[:, :, None] + factor, -1) * probabilities.sum(-1)[..., None, None]
    return after.topk(num_ranks, dim=-1)


def _order(_args: tuple, returned: tuple[Tensor, Tensor]) -> tuple[Tensor]:
    """The order, which is exact; probabilities are float32 by contract, so the reference has no float64 of them."""
    return returned[1:]


def cases(grid: Grid) -> Iterator[Case]:
    vocabulary = grid.shape.vocabulary
    for tree in grid.trees:
        if not tree.num_lookahead:
            continue

        def make(seed: int, offsets: int = tree.num_offsets, nodes: int = tree.num_nodes) -> tuple:
            draw = normal(grid.device, torch.float32, seed)
            top = (draw(1, offsets, vocabulary) * 3).softmax(-1).topk(RANKS, -1)
            tables = ((draw(vocabulary, WIDTH) * 0.4).to(grid.dtype) for _ in range(2))
            root = torch.full((1,), seed % vocabulary, device=grid.device)
            return top.values, top.indices, root, *tables, min(nodes - 1, RANKS)

        ranks = min(tree.num_nodes - 1, RANKS)
        rows = tree.num_offsets * (RANKS + 1) * WIDTH * grid.dtype.itemsize
        yield Case(
            "condition_marginals", "", grid.shape.name, tree, None, grid.dtype, make,
            num_bytes=rows + tree.num_offsets * RANKS * (12 + ranks * 8) + 8,
            operations=2 * ((tree.num_offsets - 1) * RANKS + 1) * RANKS * WIDTH,
            outcome=_order,
            alternatives={"softmax, topk": Alternative(lambda args: functools.partial(in_torch, *args), _order)},
        )  # fmt: skip
