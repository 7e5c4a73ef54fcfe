"""`gated_linear`: the upper half of a gated MLP, against two torch linears, silu and a product."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from torch import Tensor
from torch.nn.functional import linear, silu

from benchmarks.case import BOUNDS, Alternative, Case, normal
from benchmarks.shapes import Grid


def in_torch(input: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return silu(linear(input, gate)) * linear(input, up)


def cases(grid: Grid) -> Iterator[Case]:
    shape = grid.shape
    for tree in grid.trees:

        def make(seed: int, rows: int = tree.rows) -> tuple[Tensor, Tensor, Tensor]:
            random = normal(grid.device, grid.dtype, seed)
            gate, up = (random(shape.mlp_width, shape.width).mul_(shape.width**-0.5) for _ in range(2))
            return random(rows, shape.width), gate, up

        floats = 2 * shape.mlp_width * shape.width + tree.rows * (shape.width + shape.mlp_width)
        yield Case(
            "gated_linear", "", shape.name, tree, None, grid.dtype, make,
            num_bytes=floats * grid.dtype.itemsize,
            operations=4 * tree.rows * shape.mlp_width * shape.width,
            bound=BOUNDS[grid.dtype],
            alternatives={"F.linear, silu": Alternative(lambda args: functools.partial(in_torch, *args))},
        )  # fmt: skip
