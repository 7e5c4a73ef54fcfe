"""`firp::norm_qkv_rotary`: what a decoder layer does before its attention."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from firp_kernels import checks, registry
from firp_kernels.ops import joint_linear, rms_norm, rotary

SCHEMA = "(Tensor input, Tensor norm, float eps, Tensor[] weights, Tensor[] biases, Tensor cos, Tensor sin) -> Tensor"


def norm_qkv_rotary(
    input: Tensor,
    norm: Tensor,
    eps: float,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    impl: str | None = None,
) -> Tensor:
    """RMS norm, then queries, keys and values of its rows, the first two rotated: half of a layer in one call.

    Args:
        input: [B, R, d] bfloat16, float32 (float16, float64: reference only).
        norm: [d], the norm's weight; eps: added to the mean square.
        weights: [H*D, d] of queries, [Hkv*D, d] of keys, [Hkv*D, d] of values, dtype of input.
        biases: one per weight, dtype of input, or none at all.
        cos, sin: [B, R, D], dtype of input; D even.

    Returns:
        [B, R, H + 2*Hkv, D]: heads of queries, keys, values; the bits of `rms_norm`, `joint_linear` and `rotary`.

    Raises:
        ValueError, TypeError: a shape, dtype or device that disagrees, another number of weights than three, a number
            of biases that is neither 0 nor 3, outputs that are no whole heads.

    Example:
        >>> import torch, firp_kernels
        >>> eye, cos, sin = torch.eye(2), torch.zeros(1, 1, 2), torch.ones(1, 1, 2)
        >>> rows = torch.tensor([[[3.0, -3.0]]])
        >>> firp_kernels.norm_qkv_rotary(rows, torch.ones(2), 0.0, [eye, eye, eye], [], cos, sin).tolist()
        [[[[1.0, 1.0], [1.0, 1.0], [1.0, -1.0]]]]
    """
    return registry.call("norm_qkv_rotary", impl, input, norm, eps, list(weights), list(biases), cos, sin)


def fake(
    input: Tensor, norm: Tensor, eps: float, weights: Sequence[Tensor], biases: Sequence[Tensor], cos: Tensor,
    sin: Tensor,
) -> Tensor:  # fmt: skip
    heads = sum(weight.shape[0] // cos.shape[-1] for weight in weights)
    return input.new_empty(input.shape[0], input.shape[1], heads, cos.shape[-1])


def check(
    input: Tensor, norm: Tensor, eps: float, weights: Sequence[Tensor], biases: Sequence[Tensor], cos: Tensor,
    sin: Tensor,
) -> None:  # fmt: skip
    if len(weights) != 3:
        raise ValueError(f"weights: got {len(weights)}, expected 3 (queries, keys, values)")
    checks.same_device(input=input, norm=norm, cos=cos, sin=sin)
    checks.shape("norm", norm, None)
    checks.shape("input", input, None, None, norm.shape[0])
    checks.dtype("input", input, *checks.FLOATS)
    checks.dtype("norm", norm, input.dtype)
    checks.shape("cos", cos, *input.shape[:2], None)
    checks.shape("sin", sin, *cos.shape)
    checks.dtype("cos", cos, input.dtype)
    checks.dtype("sin", sin, input.dtype)
    head_dim = cos.shape[2]
    if not head_dim or head_dim % 2:
        raise ValueError(f"cos: got head_dim {head_dim}, expected an even one")
    joint_linear.check(input, weights, biases)
    for i, weight in enumerate(weights):
        if weight.shape[0] % head_dim:
            raise ValueError(f"weights[{i}]: got {weight.shape[0]} outputs, expected a multiple of head_dim {head_dim}")


def reference(
    input: Tensor, norm: Tensor, eps: float, weights: Sequence[Tensor], biases: Sequence[Tensor], cos: Tensor,
    sin: Tensor,
) -> Tensor:  # fmt: skip
    check(input, norm, eps, weights, biases, cos, sin)
    joint = joint_linear.reference(rms_norm.reference(input, norm, eps), weights, biases)
    heads = joint.unflatten(-1, (-1, cos.shape[-1]))
    rotary.reference(heads[:, :, : heads.shape[2] - weights[2].shape[0] // cos.shape[-1]], cos, sin)
    return heads
