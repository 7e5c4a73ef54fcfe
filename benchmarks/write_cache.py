"""`write_cache`: a step's keys and values after the context, against index_put."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.case import Alternative, Case, integers, normal
from benchmarks.shapes import Grid


def cases(grid: Grid) -> Iterator[Case]:
    shape, context = grid.shape, grid.contexts[0]
    for tree in grid.trees:

        def make(seed: int, rows: int = tree.rows) -> tuple:
            random = normal(grid.device, grid.dtype, seed)
            key, value = (random(1, shape.kv_heads, rows, shape.head_dim).transpose(1, 2) for _ in range(2))
            caches = (random(1, context + rows, shape.kv_heads, shape.head_dim) for _ in range(2))
            return key, value, *caches, integers(grid.device, context)

        moved = 2 * tree.rows * shape.kv_heads * shape.head_dim * grid.dtype.itemsize
        yield Case(
            "write_cache", "", shape.name, tree, context, grid.dtype, make, 2 * moved,
            alternatives={"index_put": Alternative(_index_put, _written)}, outcome=_written,
        )  # fmt: skip


def _written(args: tuple, _returned) -> tuple:
    return args[2:4]


def _index_put(args: tuple):
    key, value, key_cache, value_cache, context_lens = args
    slots = context_lens.long()[:, None] + torch.arange(key.shape[1], device=key.device)
    sequence = torch.arange(key.shape[0], device=key.device)[:, None].expand_as(slots)

    def call() -> None:
        key_cache.index_put_((sequence, slots), key)
        value_cache.index_put_((sequence, slots), value)

    return call
