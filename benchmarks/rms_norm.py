"""`rms_norm`: few rows, against torch's own rms_norm."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.case import BOUNDS, Alternative, Case, normal
from benchmarks.shapes import Grid


def cases(grid: Grid) -> Iterator[Case]:
    width = grid.shape.width
    for tree in grid.trees:

        def make(seed: int, rows: int = tree.rows) -> tuple[Tensor, Tensor, float]:
            random = normal(grid.device, grid.dtype, seed)
            return random(rows, width), random(width), 1e-5

        def prepare(args: tuple):
            input, weight, eps = args
            return functools.partial(torch.nn.functional.rms_norm, input, (width,), weight, eps)

        yield Case(
            "rms_norm", "", grid.shape.name, tree, None, grid.dtype, make,
            num_bytes=(2 * tree.rows + 1) * width * grid.dtype.itemsize,
            bound=BOUNDS[grid.dtype],
            alternatives={"F.rms_norm": Alternative(prepare)},
        )  # fmt: skip
