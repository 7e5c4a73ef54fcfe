"""The torch oracles of `row_ops.py`, where their contracts, shapes and errors are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from firp_kernels import checks


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """What numbers of a dtype are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    checks.linear(input, weight, bias)
    return torch.nn.functional.linear(input, weight, bias)


def joint_linear(input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    checks.joint_linear(input, weights, biases)
    linear = torch.nn.functional.linear
    return torch.cat([linear(input, *pair) for pair in zip(weights, biases or [None] * len(weights), strict=True)], -1)


def gated_linear(input: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    checks.gated_linear(input, gate, up)
    linear = torch.nn.functional.linear
    return torch.nn.functional.silu(linear(input, gate)) * linear(input, up)


def rms_norm(input: Tensor, weight: Tensor, eps: float) -> Tensor:
    checks.rms_norm(input, weight)
    wide = input.to(computed_in(input.dtype))
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * scaled.to(input.dtype)


def rotary(rows: Tensor, cos: Tensor, sin: Tensor) -> None:
    checks.rotary(rows, cos, sin)
    low, high = rows.chunk(2, dim=-1)
    turned = torch.cat([-high, low], dim=-1)
    rows.copy_(rows * cos[:, :, None] + turned * sin[:, :, None])


def top_marginals(logits: Tensor, rows: Tensor, num_ranks: int) -> tuple[Tensor, Tensor]:
    checks.top_marginals(logits, rows, num_ranks)
    sequence = torch.arange(logits.shape[0], device=logits.device)[:, None]
    chosen = logits[sequence, rows].to(computed_in(logits.dtype))
    top = chosen.topk(num_ranks, dim=-1)
    probabilities = (top.values - chosen.logsumexp(-1, keepdim=True)).exp()
    return probabilities.nan_to_num(nan=0.0).float(), top.indices


def condition_marginals(
    probabilities: Tensor, candidates: Tensor, root_token: Tensor, source: Tensor, target: Tensor, num_ranks: int
) -> tuple[Tensor, Tensor]:
    checks.condition_marginals(probabilities, candidates, root_token, source, target, num_ranks)
    root = root_token[:, None, None].expand(-1, 1, candidates.shape[2])
    previous = torch.cat([root, candidates[:, :-1]], 1)
    factor = source[previous].float() @ target[candidates].float().mT
    before = probabilities[:, :, None]
    highest = factor.masked_fill(before == 0, float("-inf")).amax(-1, keepdim=True)
    weight = torch.where(before > 0, before * (factor - highest).exp(), 0.0)
    after = (weight / weight.sum(-1, keepdim=True) * before.sum(-1, keepdim=True)).nan_to_num(nan=0.0)
    after, order = after.sort(dim=-1, descending=True, stable=True)
    return after[..., :num_ranks].contiguous(), order[..., :num_ranks].to(torch.int32)
