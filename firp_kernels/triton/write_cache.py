"""Write a step's keys and values behind the context: one launch for both, any strides, ragged lengths."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from firp_kernels import checks
from firp_kernels.triton.aot import Variant
from firp_kernels.triton.launch import TYPE_NAMES, on_device_of

BLOCK = 1024
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def write_cache_kernel(
    key, value, key_cache, value_cache, context_lens,
    stride_key_b, stride_key_r, stride_key_h, stride_key_d,
    stride_value_b, stride_value_r, stride_value_h, stride_value_d,
    stride_key_cache_b, stride_key_cache_s, stride_key_cache_h, stride_key_cache_d,
    stride_value_cache_b, stride_value_cache_s, stride_value_cache_h, stride_value_cache_d,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_r = tl.program_id(0).to(tl.int64)
    i_b = tl.program_id(1).to(tl.int64)
    slot = tl.load(context_lens + i_b) + i_r
    o = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    o_h, o_d = o // WIDTH, o % WIDTH
    inside = o < HEADS * WIDTH

    p_key = key + i_b * stride_key_b + i_r * stride_key_r
    p_value = value + i_b * stride_value_b + i_r * stride_value_r
    b_key = tl.load(p_key + o_h * stride_key_h + o_d * stride_key_d, mask=inside)
    b_value = tl.load(p_value + o_h * stride_value_h + o_d * stride_value_d, mask=inside)
    p_key = key_cache + i_b * stride_key_cache_b + slot * stride_key_cache_s
    p_value = value_cache + i_b * stride_value_cache_b + slot * stride_value_cache_s
    tl.store(p_key + o_h * stride_key_cache_h + o_d * stride_key_cache_d, b_key, mask=inside)
    tl.store(p_value + o_h * stride_value_cache_h + o_d * stride_value_cache_d, b_value, mask=inside)


def write_cache(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, context_lens: Tensor) -> None:
    """`ops.write_cache` on a CUDA device."""
    checks.write_cache(key, value, key_cache, value_cache, context_lens)
    batch, rows, heads, width = key.shape
    with on_device_of("key", key, write_cache_kernel, checks.FLOATS):
        if key.numel():
            write_cache_kernel[(rows, batch, triton.cdiv(heads * width, BLOCK))](
                key, value, key_cache, value_cache, context_lens.contiguous(),
                *key.stride(), *value.stride(), *key_cache.stride(), *value_cache.stride(),
                HEADS=heads, WIDTH=width, BLOCK=BLOCK, **OPTIONS,
            )  # fmt: skip


def aot_variants(capability: int) -> Iterator[Variant]:
    """Variants of the kernel for `aot`."""
    for dtype, heads, width in ((torch.bfloat16, 32, 128), (torch.float32, 3, 64), (torch.float16, 40, 128), (torch.bfloat16, 8, 80)):
        tensors = dict.fromkeys(("key", "value", "key_cache", "value_cache"), f"*{TYPE_NAMES[dtype]}:16")
        strides = [name for name in write_cache_kernel.arg_names if name.startswith("stride")]
        yield Variant(
            f"{TYPE_NAMES[dtype]} Hkv{heads} D{width}",
            write_cache_kernel,
            tensors | {"context_lens": "*i32:16"} | {name: "i32:16" for name in strides if name[-1] != "d"},
            {name: 1 for name in strides if name[-1] == "d"} | {"HEADS": heads, "WIDTH": width, "BLOCK": BLOCK},
            OPTIONS,
        )
