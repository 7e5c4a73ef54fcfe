"""`write_and_attend`: one layer's cache written and attended to, against index_put and SDPA with a dense mask."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.case import BOUNDS, Alternative, Case, drafted, integers, normal, num_bytes
from benchmarks.shapes import Grid, Tree
from benchmarks.tree_attention import QUERY_SCALE, dense_mask
from firp_kernels.ops.tree_attention import tree_mask


def cases(grid: Grid) -> Iterator[Case]:
    for tree in grid.trees:
        yield _case(grid, tree, grid.contexts[0])


def _case(grid: Grid, tree: Tree, context: int) -> Case:
    shape, rows = grid.shape, tree.rows

    def make(seed: int) -> tuple:
        random = normal(grid.device, grid.dtype, seed)
        query = random(1, shape.heads, rows, shape.head_dim).mul_(QUERY_SCALE).transpose(1, 2)
        key, value = (random(1, shape.kv_heads, rows, shape.head_dim).transpose(1, 2) for _ in range(2))
        cache = random(2, 1, context + rows, shape.kv_heads, shape.head_dim)
        _, _, depths, ancestors, lookahead = drafted(tree, shape.vocabulary, grid.device, seed)
        nodes = depths, ancestors, lookahead, tree.num_offsets
        return query, key, value, cache, integers(grid.device, context), *nodes, shape.head_dim**-0.5, None

    sample = make(0)
    visible = int(tree_mask(*sample[4:9], rows).sum())
    return Case(
        "write_and_attend", "", shape.name, tree, context, grid.dtype, make,
        num_bytes=num_bytes(*sample[:3], sample[0], *sample[1:3], sample[3]),
        operations=4 * visible * shape.heads * shape.head_dim,
        bound=BOUNDS[grid.dtype],
        outcome=lambda args, returned: (returned, args[3]),
        alternatives={"index_put + SDPA": Alternative(_index_put_sdpa, _rows_first)},
    )  # fmt: skip


def _rows_first(args: tuple, returned: Tensor) -> tuple[Tensor, Tensor]:
    return returned.transpose(1, 2), args[3]


def _index_put_sdpa(args: tuple):
    query, key, value, cache, context_lens, *tree, scale, _ = args
    rows = query.shape[1]
    slots = context_lens.long()[:, None] + torch.arange(rows, device=query.device)
    sequence = torch.zeros_like(slots)
    mask = dense_mask(context_lens, *tree, rows, query.dtype)
    attend = functools.partial(scaled_dot_product_attention, attn_mask=mask, scale=scale, enable_gqa=True)

    def call() -> Tensor:
        for side, written in zip(cache, (key, value), strict=True):
            side.index_put_((sequence, slots), written)
        return attend(*(part.transpose(1, 2) for part in (query, *cache)))

    return call
