"""`joint_linear`: queries, keys and values of a layer in one call, against three torch linears."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.case import BOUNDS, Alternative, Case, normal
from benchmarks.shapes import Grid


def in_torch(input: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    return torch.cat([linear(input, weight) for weight in weights], -1)


def cases(grid: Grid) -> Iterator[Case]:
    shape = grid.shape
    outputs = [heads * shape.head_dim for heads in (shape.heads, shape.kv_heads, shape.kv_heads)]
    for tree in grid.trees:

        def make(seed: int, rows: int = tree.rows) -> tuple[Tensor, list[Tensor], list[Tensor]]:
            random = normal(grid.device, grid.dtype, seed)
            weights = [random(count, shape.width).mul_(shape.width**-0.5) for count in outputs]
            return random(rows, shape.width), weights, []

        yield Case(
            "joint_linear", "", shape.name, tree, None, grid.dtype, make,
            num_bytes=(sum(outputs) * shape.width + tree.rows * (shape.width + sum(outputs))) * grid.dtype.itemsize,
            operations=2 * tree.rows * sum(outputs) * shape.width,
            bound=BOUNDS[grid.dtype],
            alternatives={"F.linear, cat": Alternative(lambda args: functools.partial(in_torch, *args))},
        )  # fmt: skip
