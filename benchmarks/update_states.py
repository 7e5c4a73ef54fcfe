"""`update_states`: k states of a sequence, against torch's own linears, one after the other."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu

from benchmarks.case import BOUNDS, Alternative, Case, normal
from benchmarks.shapes import Grid

OFFSETS, INNER = 3, 512


def in_torch(states: Tensor, first: Tensor, inputs: Tensor, bias: Tensor, outputs: Tensor) -> Tensor:
    shape = states.shape[-1:]
    known, parts = rms_norm(first, shape, eps=1e-6), []
    for j, state in enumerate(states.unbind(1)):
        inner = silu(linear(torch.cat([rms_norm(state, shape, eps=1e-6), known], -1), inputs[j], bias[j]))
        parts.append(state + state.square().mean(-1, keepdim=True).sqrt() * linear(inner, outputs[j]))
    return torch.stack(parts, 1)


def cases(grid: Grid) -> Iterator[Case]:
    width = grid.shape.width
    numbers = 3 * OFFSETS * INNER * width

    def make(seed: int) -> tuple[Tensor, ...]:
        random = normal(grid.device, grid.dtype, seed)
        inputs, outputs = random(OFFSETS, INNER, 2 * width), random(OFFSETS, width, INNER)
        states, first, bias = random(1, OFFSETS, width), random(1, width), random(OFFSETS, INNER)
        return states, first, inputs * (2 * width) ** -0.5, bias, outputs * INNER**-0.5

    for tree in grid.trees[:1]:  # the rows do not depend on it
        yield Case(
            "update_states", "", grid.shape.name, tree, None, grid.dtype, make,
            num_bytes=(numbers + (2 * OFFSETS + 1) * width) * grid.dtype.itemsize,
            operations=2 * numbers,
            bound=4 * BOUNDS[grid.dtype],
            alternatives={"F.linear": Alternative(lambda args: functools.partial(in_torch, *args))},
        )  # fmt: skip
