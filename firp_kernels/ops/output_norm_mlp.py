"""`firp::output_norm_mlp`: what a decoder layer does after its attention."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from firp_kernels import checks, registry
from firp_kernels.ops import gated_linear, rms_norm

SCHEMA = (
    "(Tensor attended, Tensor residual, Tensor output, Tensor? bias, Tensor norm, float eps, Tensor gate, Tensor up, "
    "Tensor down) -> Tensor"
)


def output_norm_mlp(
    attended: Tensor,
    residual: Tensor,
    output: Tensor,
    bias: Tensor | None,
    norm: Tensor,
    eps: float,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    impl: str | None = None,
) -> Tensor:
    """Attention's output projection and a gated MLP after an RMS norm, each added to its input: half of a layer in one
    call.

    Args:
        attended: [B, R, H, D] bfloat16, float32 (float16, float64: reference only).
        residual: [B, R, d], input of the layer, dtype of attended.
        output: [d, H*D]; bias: [d] or None.
        norm: [d], the norm's weight; eps: added to the mean square.
        gate, up: [m, d]; down: [d, m].

    Returns:
        [B, R, d]; the bits of `linear`, an addition, `rms_norm`, `gated_linear`, `linear`, an addition.

    Raises:
        ValueError, TypeError: a shape, dtype or device that disagrees.

    Example:
        >>> import torch, firp_kernels
        >>> attended, residual = torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[10.0, 20.0]]])
        >>> zeros = torch.zeros(2, 2)
        >>> firp_kernels.output_norm_mlp(
        ...     attended, residual, torch.eye(2), None, torch.ones(2), 0.0, zeros, zeros, zeros
        ... ).tolist()
        [[[11.0, 22.0]]]
    """
    return registry.call("output_norm_mlp", impl, attended, residual, output, bias, norm, eps, gate, up, down)


def fake(
    attended: Tensor, residual: Tensor, output: Tensor, bias: Tensor | None, norm: Tensor, eps: float, gate: Tensor,
    up: Tensor, down: Tensor,
) -> Tensor:  # fmt: skip
    return residual.new_empty(residual.shape)


def check(
    attended: Tensor, residual: Tensor, output: Tensor, bias: Tensor | None, norm: Tensor, eps: float, gate: Tensor,
    up: Tensor, down: Tensor,
) -> None:  # fmt: skip
    rest = {"residual": residual, "output": output, "norm": norm, "gate": gate, "up": up, "down": down}
    rest |= {} if bias is None else {"bias": bias}
    checks.same_device(attended=attended, **rest)
    checks.shape("residual", residual, None, None, None)
    batch, count, width = residual.shape
    checks.shape("attended", attended, batch, count, None, None)
    checks.shape("output", output, width, attended.shape[2] * attended.shape[3])
    if bias is not None:
        checks.shape("bias", bias, width)
    checks.shape("norm", norm, width)
    checks.shape("gate", gate, None, width)
    checks.shape("up", up, *gate.shape)
    checks.shape("down", down, width, gate.shape[0])
    checks.dtype("attended", attended, *checks.FLOATS)
    for name, tensor in rest.items():
        checks.dtype(name, tensor, attended.dtype)


def reference(
    attended: Tensor, residual: Tensor, output: Tensor, bias: Tensor | None, norm: Tensor, eps: float, gate: Tensor,
    up: Tensor, down: Tensor,
) -> Tensor:  # fmt: skip
    check(attended, residual, output, bias, norm, eps, gate, up, down)
    hidden = residual + functional.linear(attended.flatten(2), output, bias)
    normed = rms_norm.reference(hidden, norm, eps)
    return hidden + functional.linear(gated_linear.reference(normed, gate, up), down)
