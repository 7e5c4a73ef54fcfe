"""`add_rms_norm`: residual addition and norm of few rows, against torch's own two calls."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from torch import Tensor
from torch.nn.functional import rms_norm

from benchmarks.case import BOUNDS, Alternative, Case, normal
from benchmarks.shapes import Grid


def in_torch(hidden: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = residual + hidden
    return total, rms_norm(total, weight.shape, weight, eps)


def cases(grid: Grid) -> Iterator[Case]:
    width = grid.shape.width
    for tree in grid.trees:

        def make(seed: int, rows: int = tree.rows) -> tuple[Tensor, Tensor, Tensor, float]:
            random = normal(grid.device, grid.dtype, seed)
            return random(rows, width), random(rows, width), random(width), 1e-5

        yield Case(
            "add_rms_norm", "", grid.shape.name, tree, None, grid.dtype, make,
            num_bytes=(4 * tree.rows + 1) * width * grid.dtype.itemsize,
            bound=BOUNDS[grid.dtype],
            alternatives={"add, F.rms_norm": Alternative(lambda args: functools.partial(in_torch, *args))},
        )  # fmt: skip
