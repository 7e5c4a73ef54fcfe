"""`commit_cache`: the accepted path moved in every layer, against index_select and copy_ per layer."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.case import Alternative, Case, integers, normal
from benchmarks.shapes import Grid

# An accepted path that skips a node, as it does when the first guess was wrong.
PATH = (0, 2, 5)


def cases(grid: Grid) -> Iterator[Case]:
    shape, context = grid.shape, grid.contexts[0]
    for tree in grid.trees:
        path = PATH[: min(len(PATH), tree.num_nodes)]

        def make(seed: int, rows: int = tree.rows, path: tuple[int, ...] = path) -> tuple:
            random = normal(grid.device, grid.dtype, seed)
            cache = random(shape.layers, 2, 1, context + rows, shape.kv_heads, shape.head_dim)
            lens, nodes, accepted = (integers(grid.device, *values) for values in ((context,), path, (len(path) - 1,)))
            return cache, lens, nodes[None], accepted, torch.zeros(1, dtype=torch.bool, device=grid.device)

        moved = sum(node > i for i, node in enumerate(path))
        row = shape.layers * 2 * shape.kv_heads * shape.head_dim * grid.dtype.itemsize
        variant = f"{len(path)} accepted" if moved else "root alone"
        yield Case(
            "commit_cache", variant, shape.name, tree, context, grid.dtype, make,
            num_bytes=2 * moved * row,
            alternatives={"index_select per layer": Alternative(_per_layer, _written, capturable=False)},
            outcome=_written,
            reset=lambda args: args[1].fill_(context),
        )  # fmt: skip


def _written(args: tuple, _returned) -> tuple:
    return args[:2]


def _per_layer(args: tuple):
    cache, context_lens, path, num_accepted, _ = args

    def call() -> None:
        start, count = int(context_lens[0]), int(num_accepted[0]) + 1
        slots = path[0, :count] + start
        for layer in cache:
            for side in layer:
                side[0, start : start + count].copy_(side[0].index_select(0, slots))
        context_lens.add_(count)

    return call
