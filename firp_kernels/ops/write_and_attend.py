"""`firp::write_and_attend`: `write_cache`, then `tree_attention`, on one layer's cache.

One op, for compiled layers. A compiler that sees keys and values as two views of one mutated tensor has to rebuild
them, and torch 2.13 drops the offset of the second where shapes are dynamic.
"""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from firp_kernels import checks, registry
from firp_kernels.ops import tree_attention, write_cache
from firp_kernels.ops.rotary import rotated

SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor(a!) layer_cache, Tensor context_lens, Tensor depths, "
    "Tensor ancestors, Tensor lookahead, int num_offsets, float scale, int? sliding_window=None, Tensor? cos=None, "
    "Tensor? sin=None) -> Tensor"
)
PARTS = ("write_cache", "tree_attention")


def write_and_attend(
    query: Tensor, key: Tensor, value: Tensor, layer_cache: Tensor, context_lens: Tensor, depths: Tensor,
    ancestors: Tensor, lookahead: Tensor, num_offsets: int, scale: float, sliding_window: int | None = None,
    cos: Tensor | None = None, sin: Tensor | None = None, impl: str | None = None,
) -> Tensor:  # fmt: skip
    """Write a step's keys and values after the context of one layer's cache, then attend to all of it.

    With `cos` and `sin` queries and keys come before rotary. They get it on the way, each product and sum rounded to
    their dtype, as in `rotary`.

    Args:
        query: [B, R, H, D] as in `tree_attention`.
        key, value: [B, R, Hkv, D] as in `write_cache`.
        layer_cache: [2, B, S, Hkv, D], keys then values, written in place.
        context_lens, depths, ancestors, lookahead, num_offsets, scale, sliding_window: as in `tree_attention`.
        cos, sin: [B, R, D], dtype of query, any strides, as in `rotary`; None where query and key are rotated already.

    Returns:
        [B, R, H, D] contiguous, dtype of query: what `tree_attention` returns after `write_cache`, bit for bit.

    Raises:
        ValueError, TypeError: what these two raise; a `layer_cache` that does not fit key and value; one of `cos` and
            `sin` alone, or an odd D with them.

    Example:
        >>> import torch, firp_kernels
        >>> row, cache = torch.ones(1, 1, 1, 4), torch.zeros(2, 1, 3, 1, 4)
        >>> zero = torch.zeros(1, 1, dtype=torch.int32)  # one root node, which sees itself, after an empty context
        >>> tree = zero, zero[..., None] + 1, zero
        >>> out = firp_kernels.write_and_attend(row, row, row * 3, cache, zero[0], *tree, 3, 0.5)
        >>> out.flatten().tolist()
        [3.0, 3.0, 3.0, 3.0]
    """
    return registry.call(
        "write_and_attend", impl, query, key, value, layer_cache, context_lens, depths, ancestors, lookahead,
        num_offsets, scale, sliding_window, cos, sin,
    )  # fmt: skip


def fake(query: Tensor, *_: object) -> Tensor:
    return query.new_empty(query.shape)


def check(
    query: Tensor, key: Tensor, value: Tensor, layer_cache: Tensor, context_lens: Tensor, depths: Tensor,
    ancestors: Tensor, lookahead: Tensor, cos: Tensor | None = None, sin: Tensor | None = None,
) -> None:  # fmt: skip
    """What the checks of the two parts would report too late, or of an argument that is not theirs."""
    checks.same_device(
        query=query, key=key, value=value, layer_cache=layer_cache, context_lens=context_lens, depths=depths,
        ancestors=ancestors, lookahead=lookahead, cos=cos, sin=sin,
    )  # fmt: skip
    checks.shape("key", key, None, None, None, None)
    checks.shape("layer_cache", layer_cache, 2, key.shape[0], None, *key.shape[2:])
    checks.shape("query", query, *key.shape[:2], None, key.shape[3])
    checks.dtype("key", key, query.dtype)
    checks.dtype("layer_cache", layer_cache, query.dtype)
    if (cos is None) != (sin is None):
        raise ValueError(f"sin: got {'None' if sin is None else 'a tensor'}, expected cos and sin, or neither")
    if cos is not None and sin is not None:
        for name, part in (("cos", cos), ("sin", sin)):
            checks.shape(name, part, *key.shape[:2], key.shape[3])
            checks.dtype(name, part, query.dtype)
        if key.shape[3] % 2:
            raise ValueError(f"cos: got it with head_dim {key.shape[3]}, expected an even one")


def composed(
    ops: SimpleNamespace | ModuleType, query: Tensor, key: Tensor, value: Tensor, layer_cache: Tensor,
    context_lens: Tensor, depths: Tensor, ancestors: Tensor, lookahead: Tensor, num_offsets: int, scale: float,
    sliding_window: int | None = None, cos: Tensor | None = None, sin: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The op made of `ops.write_cache` and `ops.tree_attention`."""
    check(query, key, value, layer_cache, context_lens, depths, ancestors, lookahead, cos, sin)
    if cos is not None and sin is not None:
        query, key = rotated(query, cos, sin), rotated(key, cos, sin)
    key_cache, value_cache = layer_cache.unbind(0)
    ops.write_cache(key, value, key_cache, value_cache, context_lens)
    return ops.tree_attention(
        query, key_cache, value_cache, context_lens, depths, ancestors, lookahead, num_offsets, scale, sliding_window
    )


def reference(*args: Any) -> Tensor:
    return composed(SimpleNamespace(write_cache=write_cache.reference, tree_attention=tree_attention.reference), *args)


def fallback(*args: Any) -> Tensor:
    return composed(torch.ops.firp, *args)
