"""`firp::gated_linear`: the upper half of a gated MLP."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from firp_kernels import checks, registry

SCHEMA = "(Tensor input, Tensor gate, Tensor up) -> Tensor"


def gated_linear(input: Tensor, gate: Tensor, up: Tensor, impl: str | None = None) -> Tensor:
    """silu(input @ gate.T) * (input @ up.T): the upper half of a gated MLP, reading each weight once.

    Args:
        input: [..., in] bfloat16, float32 (float16, float64: reference only). gate, up: [out, in], dtype of input.

    Returns:
        [..., out]; both products, silu and the last product are each rounded to the dtype.

    Raises:
        ValueError, TypeError: a shape, dtype or device that disagrees.

    Source: SwiGLU, arXiv 2002.05202.

    Example:
        >>> import torch, firp_kernels
        >>> gate, up = torch.tensor([[100.0], [-100.0]]), torch.tensor([[2.0], [2.0]])
        >>> firp_kernels.gated_linear(torch.ones(1, 1), gate, up).abs().round().tolist()
        [[200.0, 0.0]]
    """
    return registry.call("gated_linear", impl, input, gate, up)


def fake(input: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return input.new_empty(*input.shape[:-1], gate.shape[0])


def check(input: Tensor, gate: Tensor, up: Tensor) -> None:
    checks.same_device(input=input, gate=gate, up=up)
    checks.shape("gate", gate, None, None)
    checks.shape("up", up, *gate.shape)
    checks.last_dimension("input", input, gate.shape[1])
    checks.dtype("input", input, *checks.FLOATS)
    checks.dtype("gate", gate, input.dtype)
    checks.dtype("up", up, input.dtype)


def reference(input: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    check(input, gate, up)
    return functional.silu(functional.linear(input, gate)) * functional.linear(input, up)
