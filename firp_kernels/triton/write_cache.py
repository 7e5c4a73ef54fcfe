"""Write a step's keys and values after the context: one launch for both, any strides, ragged lengths."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from firp_kernels.checks import FLOATS
from firp_kernels.ops.write_cache import check
from firp_kernels.triton.launch import LaunchConfig, meta, on_device_of


@triton.jit
def write_cache_kernel(
    key, value, key_cache, value_cache, context_lens,
    s_key_b, s_key_r, s_key_h, s_key_d,
    s_value_b, s_value_r, s_value_h, s_value_d,
    s_key_cache_b, s_key_cache_s, s_key_cache_h, s_key_cache_d,
    s_value_cache_b, s_value_cache_s, s_value_cache_h, s_value_cache_d,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """cache[b, context_lens[b] + r] = rows[b, r], for keys and values: BLOCK numbers of one row a program."""
    i_r = tl.program_id(0).to(tl.int64)
    i_b = tl.program_id(1).to(tl.int64)
    slot = tl.load(context_lens + i_b) + i_r  # []
    o_hd = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    o_h, o_d = o_hd // HEAD_DIM, o_hd % HEAD_DIM
    m_hd = o_hd < HEADS * HEAD_DIM

    p_key = key + i_b * s_key_b + i_r * s_key_r
    p_value = value + i_b * s_value_b + i_r * s_value_r
    b_key = tl.load(p_key + o_h * s_key_h + o_d * s_key_d, mask=m_hd)  # [BLOCK]
    b_value = tl.load(p_value + o_h * s_value_h + o_d * s_value_d, mask=m_hd)  # [BLOCK]
    p_key = key_cache + i_b * s_key_cache_b + slot * s_key_cache_s
    p_value = value_cache + i_b * s_value_cache_b + slot * s_value_cache_s
    tl.store(p_key + o_h * s_key_cache_h + o_d * s_key_cache_d, b_key, mask=m_hd)
    tl.store(p_value + o_h * s_value_cache_h + o_d * s_value_cache_d, b_value, mask=m_hd)


def launch_config() -> LaunchConfig:
    return LaunchConfig({"BLOCK": 1024}, num_warps=4)


def write_cache(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, context_lens: Tensor) -> None:
    """`firp_kernels.write_cache` on a CUDA device."""
    check(key, value, key_cache, value_cache, context_lens)
    batch, rows, heads, head_dim = key.shape
    config = launch_config()
    with on_device_of("key", key, write_cache_kernel, FLOATS):
        if key.numel():
            write_cache_kernel[(rows, batch, triton.cdiv(heads * head_dim, config.tile["BLOCK"]))](
                key, value, key_cache, value_cache, context_lens.contiguous(),
                *key.stride(), *value.stride(), *key_cache.stride(), *value_cache.stride(),
                HEADS=heads, HEAD_DIM=head_dim, **config.keywords,
            )  # fmt: skip


def aot_calls() -> Iterator[tuple]:
    """Arguments of launches for `aot`."""
    shapes = (torch.bfloat16, 32, 128), (torch.float32, 3, 64), (torch.float16, 40, 128), (torch.bfloat16, 8, 80)
    for dtype, heads, head_dim in shapes:
        rows, cache = meta(1, 64, heads, head_dim, dtype=dtype), meta(2, 1, 1024, heads, head_dim, dtype=dtype)
        yield rows, rows, cache[0], cache[1], meta(1, dtype=torch.int32)
