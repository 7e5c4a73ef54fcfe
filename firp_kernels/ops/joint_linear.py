"""`firp::joint_linear`: few rows times several weights at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from firp_kernels import checks, registry

SCHEMA = "(Tensor input, Tensor[] weights, Tensor[] biases) -> Tensor"


def joint_linear(
    input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] = (), impl: str | None = None
) -> Tensor:
    """Several `linear` over the same rows at once, such as queries, keys and values: their outputs side by side.

    Args:
        input: [..., in] bfloat16, float32 (float16, float64: reference only).
        weights: at least one [out_i, in], dtype of input.
        biases: one [out_i] per weight, dtype of input, or none at all.

    Returns:
        [..., sum of out_i]; each part has the bits that `linear` gives it.

    Raises:
        ValueError, TypeError: a shape, dtype or device that disagrees, no weight, a number of biases that is neither 0
            nor that of the weights.

    Example:
        >>> import torch, firp_kernels
        >>> query, key = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
        >>> firp_kernels.joint_linear(torch.ones(1, 2), [query, key]).tolist()
        [[3.0, 7.0]]
    """
    return registry.call("joint_linear", impl, input, list(weights), list(biases))


def fake(input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    return input.new_empty(*input.shape[:-1], sum(weight.shape[0] for weight in weights))


def check(input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> None:
    if not weights:
        raise ValueError("weights: got none, expected at least one")
    if len(biases) not in (0, len(weights)):
        raise ValueError(f"biases: got {len(biases)}, expected none or {len(weights)} (one per weight)")
    checks.dtype("input", input, *checks.FLOATS)
    for i, weight in enumerate(weights):
        checks.same_device(input=input, **{f"weights[{i}]": weight})
        checks.shape(f"weights[{i}]", weight, None, weights[0].shape[1] if i else None)
        checks.dtype(f"weights[{i}]", weight, input.dtype)
    for i, bias in enumerate(biases):
        checks.same_device(input=input, **{f"biases[{i}]": bias})
        checks.shape(f"biases[{i}]", bias, weights[i].shape[0])
        checks.dtype(f"biases[{i}]", bias, input.dtype)
    checks.last_dimension("input", input, weights[0].shape[1])


def reference(input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    check(input, weights, biases)
    pairs = zip(weights, biases or [None] * len(weights), strict=True)
    return torch.cat([functional.linear(input, weight, bias) for weight, bias in pairs], -1)
