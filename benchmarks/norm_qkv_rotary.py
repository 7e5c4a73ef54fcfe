"""`norm_qkv_rotary`: what a layer does before its attention, against the same ops one after another, and torch."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm

import firp_kernels
from benchmarks.case import BOUNDS, Alternative, Case, normal
from benchmarks.shapes import Grid
from firp_kernels.ops.rotary import rotated


def in_torch(
    input: Tensor, norm: Tensor, eps: float, weights: list[Tensor], biases: list[Tensor], cos: Tensor, sin: Tensor
) -> Tensor:
    normed = rms_norm(input, norm.shape, norm, eps)
    query, key, value = (linear(normed, weight).unflatten(-1, (-1, cos.shape[-1])) for weight in weights)
    return torch.cat([rotated(query, cos, sin), rotated(key, cos, sin), value], 2)


def in_ops(
    input: Tensor, norm: Tensor, eps: float, weights: list[Tensor], biases: list[Tensor], cos: Tensor, sin: Tensor
) -> Tensor:
    joint = firp_kernels.joint_linear(firp_kernels.rms_norm(input, norm, eps), weights, biases)
    heads = joint.unflatten(-1, (-1, cos.shape[-1]))
    firp_kernels.rotary(heads[:, :, : heads.shape[2] - weights[2].shape[0] // cos.shape[-1]], cos, sin)
    return heads


def cases(grid: Grid) -> Iterator[Case]:
    shape = grid.shape
    outputs = [heads * shape.head_dim for heads in (shape.heads, shape.kv_heads, shape.kv_heads)]
    for tree in grid.trees:

        def make(seed: int, rows: int = tree.rows) -> tuple:
            random = normal(grid.device, grid.dtype, seed)
            weights = [random(count, shape.width).mul_(shape.width**-0.5) for count in outputs]
            angles = random(1, rows, shape.head_dim)
            return random(1, rows, shape.width), random(shape.width), 1e-5, weights, [], angles.cos(), angles.sin()

        rows_read = tree.rows * (shape.width + sum(outputs) + 2 * shape.head_dim)
        yield Case(
            "norm_qkv_rotary", "", shape.name, tree, None, grid.dtype, make,
            num_bytes=(sum(outputs) * shape.width + rows_read + shape.width) * grid.dtype.itemsize,
            operations=2 * tree.rows * sum(outputs) * shape.width,
            bound=BOUNDS[grid.dtype],
            alternatives={
                "F.linear, F.rms_norm": Alternative(lambda args: functools.partial(in_torch, *args)),
                "op by op": Alternative(lambda args: functools.partial(in_ops, *args)),
            },
        )  # fmt: skip
