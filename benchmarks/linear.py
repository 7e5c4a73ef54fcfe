"""`linear`: few rows against one weight, against torch.nn.functional.linear."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from torch.nn import functional

from benchmarks.case import BOUNDS, Alternative, Case, normal
from benchmarks.shapes import Grid


def cases(grid: Grid) -> Iterator[Case]:
    shape = grid.shape
    width, mlp = shape.width, shape.mlp_width
    weights = {"up": (mlp, width), "down": (width, mlp), "head": (shape.vocabulary, width)}
    for tree in grid.trees:
        for variant, (outputs, inputs) in weights.items():

            def make(seed: int, rows: int = tree.rows, outputs: int = outputs, inputs: int = inputs) -> tuple:
                random = normal(grid.device, grid.dtype, seed)
                return random(rows, inputs), random(outputs, inputs).mul_(inputs**-0.5), None

            yield Case(
                "linear", variant, shape.name, tree, None, grid.dtype, make,
                num_bytes=(outputs * inputs + tree.rows * (inputs + outputs)) * grid.dtype.itemsize,
                operations=2 * tree.rows * outputs * inputs,
                bound=BOUNDS[grid.dtype],
                alternatives={"F.linear": Alternative(lambda args: functools.partial(functional.linear, *args))},
            )  # fmt: skip
