"""`firp::write_cache`: a step's keys and values go into the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from firp_kernels import checks, registry

SCHEMA = "(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor context_lens) -> ()"


def write_cache(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, context_lens: Tensor, impl: str | None = None
) -> None:
    """Write a step's keys and values after the context of one layer's cache, in place.

    Args:
        key, value: [B, R, Hkv, D] rows of this step (any strides), key after rotary.
        key_cache, value_cache: [B, S, Hkv, D]; row r goes to slot context_lens + r.
        context_lens: [B] int32 committed tokens.

    Raises:
        ValueError, TypeError: a shape, dtype or device that disagrees; on a CPU also a length past the capacity.

    Example:
        >>> import torch, firp_kernels
        >>> rows, caches = torch.ones(1, 2, 1, 4), torch.zeros(2, 1, 5, 1, 4)
        >>> firp_kernels.write_cache(rows, rows, caches[0], caches[1], torch.tensor([1], dtype=torch.int32))
        >>> caches[0, 0, :, 0, 0].tolist()
        [0.0, 1.0, 1.0, 0.0, 0.0]
    """
    registry.call("write_cache", impl, key, value, key_cache, value_cache, context_lens)


def fake(*_: object) -> None:
    return None


def check(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, context_lens: Tensor) -> None:
    checks.same_device(key=key, value=value, key_cache=key_cache, value_cache=value_cache, context_lens=context_lens)
    checks.shape("key", key, None, None, None, None)
    batch, rows, heads, head_dim = key.shape
    checks.shape("value", value, *key.shape)
    checks.shape("key_cache", key_cache, batch, None, heads, head_dim)
    checks.shape("value_cache", value_cache, *key_cache.shape)
    checks.shape("context_lens", context_lens, batch)
    checks.dtype("key", key, *checks.FLOATS)
    for name, tensor in (("value", value), ("key_cache", key_cache), ("value_cache", value_cache)):
        checks.dtype(name, tensor, key.dtype)
    checks.dtype("context_lens", context_lens, torch.int32)
    checks.room(context_lens, rows, key_cache.shape[1])


def reference(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, context_lens: Tensor) -> None:
    check(key, value, key_cache, value_cache, context_lens)
    batch, rows = key.shape[:2]
    sequence = torch.arange(batch, device=key.device)[:, None]
    slots = context_lens.long()[:, None] + torch.arange(rows, device=key.device)  # [B, R]
    key_cache[sequence, slots] = key
    value_cache[sequence, slots] = value
