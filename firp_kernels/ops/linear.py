"""`firp::linear`: few rows times one weight."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from firp_kernels import checks, registry

SCHEMA = "(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor"


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, impl: str | None = None) -> Tensor:
    """input @ weight.T + bias for few rows, reading the weight once.

    In the extension a row's bits do not depend on how many rows there are, so that plain decoding and tree decoding
    agree bit for bit on a CPU. torch's own linear may differ between row counts.

    Args:
        input: [..., in] floats. weight: [out, in], bias: [out] or None, dtype of input.

    Returns:
        [..., out], accumulated in float32 (float64 for float64).

    Raises:
        ValueError, TypeError: a shape, dtype or device that disagrees.

    Example:
        >>> import torch, firp_kernels
        >>> weight = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
        >>> firp_kernels.linear(torch.ones(1, 2), weight, torch.tensor([0.0, 0.0, 1.0])).tolist()
        [[3.0, 7.0, 12.0]]
    """
    return registry.call("linear", impl, input, weight, bias)


def fake(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return input.new_empty(*input.shape[:-1], weight.shape[0])


def check(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    checks.same_device(input=input, weight=weight, bias=bias)
    checks.shape("weight", weight, None, None)
    checks.last_dimension("input", input, weight.shape[1])
    checks.dtype("input", input, *checks.FLOATS)
    checks.dtype("weight", weight, input.dtype)
    if bias is not None:
        checks.shape("bias", bias, weight.shape[0])
        checks.dtype("bias", bias, input.dtype)


def reference(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    check(input, weight, bias)
    return functional.linear(input, weight, bias)
