"""Marginals conditioned on the previous token: a dozen small torch calls of a step in one launch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from firp_kernels.checks import FLOATS
from firp_kernels.ops.condition_marginals import check
from firp_kernels.triton.launch import LaunchConfig, meta, on_device_of


@triton.jit
def condition_marginals_kernel(
    probabilities, candidates, root_token, source, target, out, order, num_offsets, s_source_v, s_target_v,
    COUNT: tl.constexpr, RANKS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """p'(x) ~ p(x) * exp(source[previous] . target[x]), with the sum of p, its RANKS largest in descending order.

    One row a program: the COUNT candidates x of one depth after one token. WIDTH is r.
    """
    i_row = tl.program_id(0).to(tl.int64)
    i_c, i_depth = i_row % COUNT, i_row // COUNT
    first = i_depth * COUNT
    if i_depth % num_offsets == 0:
        previous = tl.load(root_token + i_depth // num_offsets)  # []
    else:
        previous = tl.load(candidates + first - COUNT + i_c)  # []
    o_k = tl.arange(0, BLOCK_K)
    m_k = o_k < COUNT
    b_before = tl.load(probabilities + first + o_k, mask=m_k, other=0.0)  # [BLOCK_K]
    b_token = tl.load(candidates + first + o_k, mask=m_k, other=0)  # [BLOCK_K]
    b_factor = tl.zeros([BLOCK_K], tl.float32)
    for i_w in range(0, WIDTH, BLOCK_W):
        o_w = i_w + tl.arange(0, BLOCK_W)
        m_w = o_w < WIDTH
        b_source = tl.load(source + previous * s_source_v + o_w, mask=m_w, other=0.0).to(tl.float32)  # [BLOCK_W]
        p_target = target + b_token[:, None] * s_target_v + o_w[None, :]
        b_target = tl.load(p_target, mask=m_k[:, None] & m_w[None, :], other=0.0).to(tl.float32)  # [BLOCK_K, BLOCK_W]
        b_factor += tl.sum(b_source[None, :] * b_target, 1)

    m_possible = b_before > 0.0
    highest = tl.max(tl.where(m_possible, b_factor, float("-inf")), 0)
    b_weight = tl.where(m_possible, b_before * tl.exp(b_factor - highest), 0.0)
    total = tl.sum(b_weight, 0)
    # False for a NaN too.
    usable = (total > 0.0) & (total < float("inf"))
    # `/` would be an approximate division on a GPU: a candidate that takes everything keeps exactly the sum of p.
    b_share = tl.div_rn(b_weight, tl.where(usable, total, 1.0))  # [BLOCK_K]
    b_after = tl.where(usable, b_share * tl.sum(b_before, 0), 0.0)
    b_after = tl.where(m_k, b_after, -1.0)
    m_tie = (b_after[None, :] == b_after[:, None]) & (o_k[None, :] < o_k[:, None])
    m_ahead = (b_after[None, :] > b_after[:, None]) | m_tie
    b_rank = tl.sum(m_ahead.to(tl.int32), 1)
    m_kept = m_k & (b_rank < RANKS)
    tl.store(out + i_row * RANKS + b_rank, b_after, mask=m_kept)
    tl.store(order + i_row * RANKS + b_rank, o_k, mask=m_kept)


def launch_config(count: int) -> LaunchConfig:
    """A draft's 16 candidates are work for one warp."""
    return LaunchConfig({"BLOCK_K": triton.next_power_of_2(count), "BLOCK_W": 64}, num_warps=1 if count <= 16 else 4)


def condition_marginals(
    probabilities: Tensor, candidates: Tensor, root_token: Tensor, source: Tensor, target: Tensor, num_ranks: int
) -> tuple[Tensor, Tensor]:
    """`firp_kernels.condition_marginals` on a CUDA device."""
    check(probabilities, candidates, root_token, source, target, num_ranks)
    batch, offsets, count = probabilities.shape
    out = probabilities.new_empty(batch, offsets, count, num_ranks)
    order = torch.empty_like(out, dtype=torch.int32)
    source, target = (table if table.stride(1) == 1 else table.contiguous() for table in (source, target))
    with on_device_of("source", source, condition_marginals_kernel, FLOATS):
        if out.numel():
            condition_marginals_kernel[(batch * offsets * count,)](
                probabilities.contiguous(), candidates.contiguous(), root_token.contiguous(), source, target, out,
                order, offsets, source.stride(0), target.stride(0), COUNT=count, RANKS=num_ranks, WIDTH=source.shape[1],
                **launch_config(count).keywords,
            )  # fmt: skip
    return out, order


def aot_calls() -> Iterator[tuple]:
    """Arguments of launches for `aot`."""
    for dtype, count, ranks, width in (
        (torch.bfloat16, 16, 16, 64), (torch.bfloat16, 16, 4, 64), (torch.float16, 16, 7, 32),
        (torch.float32, 40, 40, 100),
    ):  # fmt: skip
        candidates, root = meta(1, 3, count, dtype=torch.int64), meta(1, dtype=torch.int64)
        table = meta(32_000, width, dtype=dtype)
        yield meta(1, 3, count, dtype=torch.float32), candidates, root, table, table, ranks
