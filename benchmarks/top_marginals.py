"""`top_marginals`: the marginals of one lookahead node, against topk and logsumexp of torch."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.case import Alternative, Case, normal
from benchmarks.shapes import Grid, Tree


def in_torch(logits: Tensor, rows: Tensor, num_ranks: int) -> tuple[Tensor, Tensor]:
    chosen = logits[torch.arange(len(rows), device=rows.device)[:, None], rows].float()
    top = chosen.topk(num_ranks, dim=-1)
    return (top.values - chosen.logsumexp(-1, keepdim=True)).exp(), top.indices


def _probabilities(_args: tuple, returned: tuple[Tensor, Tensor]) -> tuple[Tensor]:
    return returned[:1]


def cases(grid: Grid) -> Iterator[Case]:
    vocabulary = grid.shape.vocabulary
    for tree in grid.trees:
        if not tree.num_lookahead:
            continue

        def make(seed: int, tree: Tree = tree) -> tuple:
            logits = normal(grid.device, grid.dtype, seed)(1, tree.rows, vocabulary)
            rows = tree.num_nodes + torch.arange(tree.num_offsets, device=grid.device)[None]
            return logits, rows, min(tree.num_nodes - 1, 16)

        yield Case(
            "top_marginals", "", grid.shape.name, tree, None, grid.dtype, make,
            num_bytes=tree.num_offsets * vocabulary * grid.dtype.itemsize,
            bound=2.0**-17,
            outcome=_probabilities,
            alternatives={
                "topk, logsumexp": Alternative(lambda args: functools.partial(in_torch, *args), _probabilities)
            },
        )  # fmt: skip
