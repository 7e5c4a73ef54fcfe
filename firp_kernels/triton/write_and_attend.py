"""Write a step's keys and values, then attend: the launches of `write_cache` and `tree_attention`.

With cosines and sines the first of them rotates keys on their way into the cache, and queries beside them.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import torch
import triton
import triton.language as tl
from torch import Tensor

from firp_kernels.ops.write_and_attend import check, composed
from firp_kernels.ops.write_cache import check as check_write
from firp_kernels.triton.launch import LaunchConfig, meta, on_device_of
from firp_kernels.triton.tree_attention import tree_attention
from firp_kernels.triton.write_cache import write_cache


@triton.jit
def _rotated(p_low, p_high, p_cos, p_sin, s_half_cos, s_half_sin, m_d):
    """Both halves of rows after rotary, [BLOCK] each; products and sums in float32, each rounded to their dtype."""
    b_low, b_high = tl.load(p_low, mask=m_d), tl.load(p_high, mask=m_d)  # [BLOCK], [BLOCK]
    dtype: tl.constexpr = b_low.dtype
    b_low, b_high = b_low.to(tl.float32), b_high.to(tl.float32)
    b_cos_low, b_cos_high = tl.load(p_cos, mask=m_d), tl.load(p_cos + s_half_cos, mask=m_d)  # [BLOCK], [BLOCK]
    b_sin_low, b_sin_high = tl.load(p_sin, mask=m_d), tl.load(p_sin + s_half_sin, mask=m_d)  # [BLOCK], [BLOCK]
    b_kept_low = (b_low * b_cos_low.to(tl.float32)).to(dtype).to(tl.float32)
    b_kept_high = (b_high * b_cos_high.to(tl.float32)).to(dtype).to(tl.float32)
    b_crossed_low = (-b_high * b_sin_low.to(tl.float32)).to(dtype).to(tl.float32)
    b_crossed_high = (b_low * b_sin_high.to(tl.float32)).to(dtype).to(tl.float32)
    return (b_kept_low + b_crossed_low).to(dtype), (b_kept_high + b_crossed_high).to(dtype)


@triton.jit
def rotate_and_write_kernel(
    query, key, value, cos, sin, out, layer_cache, context_lens,
    s_query_b, s_query_r, s_query_h, s_query_d,
    s_key_b, s_key_r, s_key_h, s_key_d,
    s_value_b, s_value_r, s_value_h, s_value_d,
    s_cos_b, s_cos_r, s_cos_d,
    s_sin_b, s_sin_r, s_sin_d,
    s_out_b, s_out_r, s_out_h,
    s_cache_side, s_cache_b, s_cache_s, s_cache_h, s_cache_d,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, QUERY_BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = rotary of queries; cache[:, b, context_lens[b] + r] = rotary of keys, values.

    BLOCK pairs of one row a program, of its queries or of its keys and values.
    """
    i_r = tl.program_id(0).to(tl.int64)
    i_b = tl.program_id(1).to(tl.int64)
    i_c = tl.program_id(2)
    of_keys = i_c >= QUERY_BLOCKS
    o_hd = tl.where(of_keys, i_c - QUERY_BLOCKS, i_c) * BLOCK + tl.arange(0, BLOCK)
    o_h, o_d = o_hd // HALF, o_hd % HALF
    m_d = o_hd < tl.where(of_keys, KV_HEADS, HEADS) * HALF

    p_cos = cos + i_b * s_cos_b + i_r * s_cos_r + o_d * s_cos_d
    p_sin = sin + i_b * s_sin_b + i_r * s_sin_r + o_d * s_sin_d
    if of_keys:
        slot = tl.load(context_lens + i_b) + i_r  # []
        p_key = key + i_b * s_key_b + i_r * s_key_r + o_h * s_key_h + o_d * s_key_d
        p_value = value + i_b * s_value_b + i_r * s_value_r + o_h * s_value_h + o_d * s_value_d
        p_cache = layer_cache + i_b * s_cache_b + slot * s_cache_s + o_h * s_cache_h + o_d * s_cache_d
        b_low, b_high = _rotated(p_key, p_key + HALF * s_key_d, p_cos, p_sin, HALF * s_cos_d, HALF * s_sin_d, m_d)
        b_value_low = tl.load(p_value, mask=m_d)  # [BLOCK]
        b_value_high = tl.load(p_value + HALF * s_value_d, mask=m_d)  # [BLOCK]
        tl.store(p_cache, b_low, mask=m_d)
        tl.store(p_cache + HALF * s_cache_d, b_high, mask=m_d)
        p_cache += tl.cast(s_cache_side, tl.int64)
        tl.store(p_cache, b_value_low, mask=m_d)
        tl.store(p_cache + HALF * s_cache_d, b_value_high, mask=m_d)
    else:
        p_query = query + i_b * s_query_b + i_r * s_query_r + o_h * s_query_h + o_d * s_query_d
        p_out = out + i_b * s_out_b + i_r * s_out_r + o_h * s_out_h + o_d
        b_low, b_high = _rotated(p_query, p_query + HALF * s_query_d, p_cos, p_sin, HALF * s_cos_d, HALF * s_sin_d, m_d)
        tl.store(p_out, b_low, mask=m_d)
        tl.store(p_out + HALF, b_high, mask=m_d)


def launch_config() -> LaunchConfig:
    """Products and sums are rounded one by one: multiply-adds do not contract."""
    return LaunchConfig({"BLOCK": 512}, num_warps=4, fp_fusion=False)


def rotate_and_write(
    query: Tensor, key: Tensor, value: Tensor, layer_cache: Tensor, context_lens: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """Queries [B, R, H, D] after rotary; the cache gets keys after rotary, and values, in the same launch."""
    batch, rows, heads, head_dim = query.shape
    kv_heads, half, config = key.shape[2], head_dim // 2, launch_config()
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    block = config.tile["BLOCK"]
    query_blocks, key_blocks = triton.cdiv(heads * half, block), triton.cdiv(kv_heads * half, block)
    if out.numel() or key.numel():
        rotate_and_write_kernel[(rows, batch, query_blocks + key_blocks)](
            query, key, value, cos, sin, out, layer_cache, context_lens.contiguous(),
            *query.stride(), *key.stride(), *value.stride(), *cos.stride(), *sin.stride(), *out.stride()[:3],
            *layer_cache.stride(), HEADS=heads, KV_HEADS=kv_heads, HALF=half, QUERY_BLOCKS=query_blocks,
            **config.keywords,
        )  # fmt: skip
    return out


def write_and_attend(
    query: Tensor, key: Tensor, value: Tensor, layer_cache: Tensor, context_lens: Tensor, depths: Tensor,
    ancestors: Tensor, lookahead: Tensor, num_offsets: int, scale: float, sliding_window: int | None = None,
    cos: Tensor | None = None, sin: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`firp_kernels.write_and_attend` on a CUDA device."""
    tree = context_lens, depths, ancestors, lookahead, num_offsets, scale, sliding_window
    if cos is None or sin is None:
        ops = SimpleNamespace(write_cache=write_cache, tree_attention=tree_attention)
        return composed(ops, query, key, value, layer_cache, *tree, cos, sin)
    check(query, key, value, layer_cache, context_lens, depths, ancestors, lookahead, cos, sin)
    key_cache, value_cache = layer_cache.unbind(0)
    check_write(key, value, key_cache, value_cache, context_lens)
    with on_device_of("query", query, rotate_and_write_kernel):
        query = rotate_and_write(query, key, value, layer_cache, context_lens, cos, sin)
    return tree_attention(query, key_cache, value_cache, *tree)


def aot_calls() -> Iterator[tuple]:
    """Arguments of launches for `aot`: those that rotate."""
    for dtype, heads, kv_heads, head_dim in (
        (torch.bfloat16, 32, 8, 128), (torch.float32, 9, 3, 64), (torch.float16, 40, 40, 80),
    ):  # fmt: skip
        query, key = meta(1, 64, heads, head_dim, dtype=dtype), meta(1, 64, kv_heads, head_dim, dtype=dtype)
        cache, angles = meta(2, 1, 1024, kv_heads, head_dim, dtype=dtype), meta(1, 64, head_dim, dtype=dtype)
        lens, depths = meta(1, dtype=torch.int32), meta(1, 64, dtype=torch.int32)
        ancestors, lookahead = meta(1, 64, 2, dtype=torch.int32), meta(1, 0, dtype=torch.int32)
        yield query, key, key, cache, lens, depths, ancestors, lookahead, 0, head_dim**-0.5, None, angles, angles
