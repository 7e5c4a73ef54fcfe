"""`rotary`: queries of few rows rotated in place, against the torch expression of Hugging Face's Llama."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.case import BOUNDS, Alternative, Case, normal
from benchmarks.shapes import Grid


def in_torch(rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = rows.chunk(2, dim=-1)
    return rows * cos[:, :, None] + torch.cat([-high, low], dim=-1) * sin[:, :, None]


def cases(grid: Grid) -> Iterator[Case]:
    shape = grid.shape
    for tree in grid.trees:

        def make(seed: int, rows: int = tree.rows) -> tuple[Tensor, Tensor, Tensor]:
            random = normal(grid.device, grid.dtype, seed)
            angles = normal(grid.device, torch.float32, seed)(1, rows, shape.head_dim)
            queries = random(1, rows, shape.heads, shape.head_dim)
            return queries, angles.cos().to(grid.dtype), angles.sin().to(grid.dtype)

        yield Case(
            "rotary", "", shape.name, tree, None, grid.dtype, make,
            num_bytes=(2 * shape.heads + 2) * tree.rows * shape.head_dim * grid.dtype.itemsize,
            bound=BOUNDS[grid.dtype],
            outcome=lambda args, returned: (args[0],),
            alternatives={"torch": Alternative(lambda args: functools.partial(in_torch, *args))},
        )  # fmt: skip
