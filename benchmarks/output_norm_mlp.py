"""`output_norm_mlp`: what a layer does after its attention, against the same ops one after another, and torch."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu

import firp_kernels
from benchmarks.case import BOUNDS, Alternative, Case, normal
from benchmarks.shapes import Grid


def in_torch(
    attended: Tensor, residual: Tensor, output: Tensor, bias: None, norm: Tensor, eps: float, gate: Tensor, up: Tensor,
    down: Tensor,
) -> Tensor:  # fmt: skip
    hidden = residual + linear(attended.flatten(2), output)
    normed = rms_norm(hidden, norm.shape, norm, eps)
    return hidden + linear(silu(linear(normed, gate)) * linear(normed, up), down)


def in_ops(
    attended: Tensor, residual: Tensor, output: Tensor, bias: None, norm: Tensor, eps: float, gate: Tensor, up: Tensor,
    down: Tensor,
) -> Tensor:  # fmt: skip
    hidden = residual + firp_kernels.linear(attended.flatten(2), output)
    normed = firp_kernels.rms_norm(hidden, norm, eps)
    return hidden + firp_kernels.linear(firp_kernels.gated_linear(normed, gate, up), down)


def cases(grid: Grid) -> Iterator[Case]:
    shape = grid.shape
    inputs = shape.heads * shape.head_dim
    weights = inputs * shape.width + 3 * shape.mlp_width * shape.width
    for tree in grid.trees:

        def make(seed: int, rows: int = tree.rows) -> tuple:
            random = normal(grid.device, grid.dtype, seed)
            output = random(shape.width, inputs).mul_(inputs**-0.5)
            gate, up = (random(shape.mlp_width, shape.width).mul_(shape.width**-0.5) for _ in range(2))
            down = random(shape.width, shape.mlp_width).mul_(shape.mlp_width**-0.5)
            attended = random(1, rows, shape.heads, shape.head_dim)
            return attended, random(1, rows, shape.width), output, None, random(shape.width), 1e-5, gate, up, down

        yield Case(
            "output_norm_mlp", "", shape.name, tree, None, grid.dtype, make,
            num_bytes=(weights + shape.width + tree.rows * (inputs + 2 * shape.width)) * grid.dtype.itemsize,
            operations=2 * tree.rows * weights,
            bound=BOUNDS[grid.dtype],
            alternatives={
                "F.linear, F.rms_norm": Alternative(lambda args: functools.partial(in_torch, *args)),
                "op by op": Alternative(lambda args: functools.partial(in_ops, *args)),
            },
        )  # fmt: skip
