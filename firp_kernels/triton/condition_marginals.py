"""Marginals behind each token that may come before them: a dozen small torch calls of a step in one launch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from firp_kernels import checks
from firp_kernels.triton.aot import Variant
from firp_kernels.triton.launch import TYPE_NAMES, on_device_of

BLOCK_WIDTH = 64


@triton.jit
def condition_marginals_kernel(
    probabilities, candidates, root_token, source, target, out, order, num_offsets, stride_source, stride_target,
    COUNT: tl.constexpr, RANKS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_COUNT: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    i_c, i_depth = i % COUNT, i // COUNT
    first = i_depth * COUNT
    if i_depth % num_offsets == 0:
        previous = tl.load(root_token + i_depth // num_offsets)
    else:
        previous = tl.load(candidates + first - COUNT + i_c)
    o_x = tl.arange(0, BLOCK_COUNT)
    inside = o_x < COUNT
    b_before = tl.load(probabilities + first + o_x, mask=inside, other=0.0)
    b_tokens = tl.load(candidates + first + o_x, mask=inside, other=0)
    b_factor = tl.zeros([BLOCK_COUNT], tl.float32)
    for start in range(0, WIDTH, BLOCK_WIDTH):
        o_w = start + tl.arange(0, BLOCK_WIDTH)
        b_source = tl.load(source + previous * stride_source + o_w, mask=o_w < WIDTH, other=0.0).to(tl.float32)
        p_target = target + b_tokens[:, None] * stride_target + o_w[None, :]
        b_target = tl.load(p_target, mask=inside[:, None] & (o_w < WIDTH)[None, :], other=0.0).to(tl.float32)
        b_factor += tl.sum(b_source[None, :] * b_target, 1)

    possible = b_before > 0.0
    highest = tl.max(tl.where(possible, b_factor, float("-inf")), 0)
    b_weight = tl.where(possible, b_before * tl.exp(b_factor - highest), 0.0)
    total = tl.sum(b_weight, 0)
    # False for a NaN too.
    usable = (total > 0.0) & (total < float("inf"))
    b_after = tl.where(usable, b_weight / tl.where(usable, total, 1.0) * tl.sum(b_before, 0), 0.0)
    b_after = tl.where(inside, b_after, -1.0)
    ahead = (b_after[None, :] > b_after[:, None]) | ((b_after[None, :] == b_after[:, None]) & (o_x[None, :] < o_x[:, None]))
    rank = tl.sum(ahead.to(tl.int32), 1)
    kept = inside & (rank < RANKS)
    tl.store(out + i * RANKS + rank, b_after, mask=kept)
    tl.store(order + i * RANKS + rank, o_x, mask=kept)


def options(count: int) -> dict:
    """A draft's 16 candidates are work for one warp."""
    return {"num_warps": 1 if count <= 16 else 4, "enable_fp_fusion": True}


def condition_marginals(
    probabilities: Tensor, candidates: Tensor, root_token: Tensor, source: Tensor, target: Tensor, num_ranks: int
) -> tuple[Tensor, Tensor]:
    """`ops.condition_marginals` on a CUDA device."""
    checks.condition_marginals(probabilities, candidates, root_token, source, target, num_ranks)
    batch, offsets, count = probabilities.shape
    out = probabilities.new_empty(batch, offsets, count, num_ranks)
    order = torch.empty_like(out, dtype=torch.int32)
    source, target = (table if table.stride(1) == 1 else table.contiguous() for table in (source, target))
    with on_device_of("source", source, condition_marginals_kernel, checks.FLOATS):
        if out.numel():
            condition_marginals_kernel[(batch * offsets * count,)](
                probabilities.contiguous(), candidates.contiguous(), root_token.contiguous(), source, target, out, order,
                offsets, source.stride(0), target.stride(0), COUNT=count, RANKS=num_ranks, WIDTH=source.shape[1],
                BLOCK_COUNT=triton.next_power_of_2(count), BLOCK_WIDTH=BLOCK_WIDTH, **options(count),
            )  # fmt: skip
    return out, order


def aot_variants(capability: int) -> Iterator[Variant]:
    """Variants of the kernel for `aot`."""
    for dtype, count, ranks, width in (
        (torch.bfloat16, 16, 16, 64), (torch.bfloat16, 16, 4, 64), (torch.float16, 16, 7, 32), (torch.float32, 40, 40, 100),
    ):  # fmt: skip
        pointers = {"probabilities": "*fp32:16", "candidates": "*i64:16", "root_token": "*i64:16", "out": "*fp32:16", "order": "*i32:16"}
        tables = dict.fromkeys(("source", "target"), f"*{TYPE_NAMES[dtype]}:16")
        strides = dict.fromkeys(("stride_source", "stride_target"), "i32:16" if width % 16 == 0 else "i32")
        yield Variant(
            f"{TYPE_NAMES[dtype]} K{count} R{ranks} r{width}",
            condition_marginals_kernel,
            pointers | tables | {"num_offsets": "i32"} | strides,
            {"COUNT": count, "RANKS": ranks, "WIDTH": width, "BLOCK_COUNT": triton.next_power_of_2(count), "BLOCK_WIDTH": BLOCK_WIDTH},
            options(count),
        )
