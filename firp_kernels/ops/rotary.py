"""`firp::rotary`: rotary position embedding of few rows."""

from __future__ import annotations

import torch
from torch import Tensor

from firp_kernels import checks, registry

SCHEMA = "(Tensor(a!) rows, Tensor cos, Tensor sin) -> ()"


def rotary(rows: Tensor, cos: Tensor, sin: Tensor, impl: str | None = None) -> None:
    """Rotary position embedding over the whole head, in place: rows * cos + rotate_half(rows) * sin.

    Args:
        rows: [B, R, H, D] queries or keys, bfloat16, float32 (float16, float64: reference only); D even, last dimension
            dense.
        cos, sin: [B, R, D], dtype of rows.

    Raises:
        ValueError, TypeError: a shape, dtype or device that disagrees, a strided last dimension.

    Source: arXiv 2104.09864, in the half-split layout of Hugging Face's Llama.

    Example:
        >>> import torch, firp_kernels
        >>> rows, cos, sin = torch.tensor([1.0, 2.0]).view(1, 1, 1, 2), torch.zeros(1, 1, 2), torch.ones(1, 1, 2)
        >>> firp_kernels.rotary(rows, cos, sin)
        >>> rows.flatten().tolist()
        [-2.0, 1.0]
    """
    registry.call("rotary", impl, rows, cos, sin)


def fake(*_: object) -> None:
    return None


def check(rows: Tensor, cos: Tensor, sin: Tensor) -> None:
    checks.same_device(rows=rows, cos=cos, sin=sin)
    checks.shape("rows", rows, None, None, None, None)
    batch, count, _, head_dim = rows.shape
    checks.shape("cos", cos, batch, count, head_dim)
    checks.shape("sin", sin, *cos.shape)
    checks.dtype("rows", rows, *checks.FLOATS)
    checks.dtype("cos", cos, rows.dtype)
    checks.dtype("sin", sin, rows.dtype)
    if head_dim % 2:
        raise ValueError(f"rows: got head_dim {head_dim}, expected an even one")
    if rows.stride(3) != 1:
        raise ValueError("rows: got a strided last dimension, expected a dense one")


def rotated(rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rows [B, R, H, D] after rotary; each product and the sum is rounded to their dtype."""
    low, high = rows.chunk(2, dim=-1)
    half_rotated = torch.cat([-high, low], dim=-1)
    return rows * cos[:, :, None] + half_rotated * sin[:, :, None]


def reference(rows: Tensor, cos: Tensor, sin: Tensor) -> None:
    check(rows, cos, sin)
    rows.copy_(rotated(rows, cos, sin))
