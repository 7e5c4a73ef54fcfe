"""`firp::rms_norm`: root-mean-square norm of few rows."""

from __future__ import annotations

import torch
from torch import Tensor

from firp_kernels import checks, registry

SCHEMA = "(Tensor input, Tensor weight, float eps) -> Tensor"


def rms_norm(input: Tensor, weight: Tensor, eps: float, impl: str | None = None) -> Tensor:
    """weight * (input / sqrt(mean(input ** 2) + eps)) over the last dimension.

    Args:
        input: [..., d] bfloat16, float32 (float16, float64: reference only). weight: [d], dtype of input.
        eps: added to the mean square.

    Returns:
        [..., d]; computed in float32 (float64 for float64), rounded to the dtype before and after the product with
        weight, as the Hugging Face modules do.

    Raises:
        ValueError, TypeError: a shape, dtype or device that disagrees.

    Source: arXiv 1910.07467.

    Example:
        >>> import torch, firp_kernels
        >>> firp_kernels.rms_norm(torch.tensor([[3.0, -3.0]]), torch.tensor([1.0, 2.0]), 0.0).tolist()
        [[1.0, -2.0]]
    """
    return registry.call("rms_norm", impl, input, weight, eps)


def fake(input: Tensor, weight: Tensor, eps: float) -> Tensor:
    return input.new_empty(input.shape)


def check(input: Tensor, weight: Tensor, eps: float) -> None:
    checks.same_device(input=input, weight=weight)
    checks.shape("weight", weight, None)
    checks.last_dimension("input", input, weight.shape[0])
    checks.dtype("input", input, *checks.FLOATS)
    checks.dtype("weight", weight, input.dtype)


def reference(input: Tensor, weight: Tensor, eps: float) -> Tensor:
    check(input, weight, eps)
    wide = input.to(checks.computed_in(input.dtype))
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * scaled.to(input.dtype)
