"""How the splits of a tile of tree attention become its output, always in their order.

The last program of a tile to come joins them where they are few bytes. Many bytes would keep one multiprocessor busy
for longer than a second launch, which shares them out, takes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from firp_kernels.triton.launch import LaunchConfig

BLOCK_S = tl.constexpr(16)
# Estimated: what one multiprocessor joins in the time of a launch. Twice as much cost an H100 5.6 to 11.8 us a layer.
IN_PLACE_BYTES = 1 << 16
ROWS = 4


def joins_in_place(splits: int, rows: int, head_dim: int) -> bool:
    """Whether the last program of a tile of `rows` rows joins its `splits` float32 results."""
    return splits * rows * head_dim * 4 <= IN_PLACE_BYTES


@triton.jit
def join_splits(
    partial, log_sums, out, o_row, m_m, s_split, num_splits,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out = sum over splits of partial * 2^(log_sum - max) / sum of these weights, for the rows of one tile.

    A few columns and eight splits at a time. Other multiprocessors wrote them, so the level-1 cache is passed by.
    """
    WIDTH: tl.constexpr = min(BLOCK_D, max(16, 2048 // BLOCK_M))
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_total = tl.zeros([BLOCK_M], tl.float32)
    for i_first in range(0, num_splits, BLOCK_S):
        o_s = i_first + tl.arange(0, BLOCK_S)
        p_logs = log_sums + o_s[:, None].to(tl.int64) * s_split + o_row[None, :]
        m_logs = (o_s < num_splits)[:, None] & m_m[None, :]
        b_logs = tl.load(p_logs, m_logs, float("-inf"), cache_modifier=".cg")  # [BLOCK_S, BLOCK_M]
        b_new = tl.maximum(b_max, tl.max(b_logs, 0))
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_total = b_total * tl.exp2(b_max - b_shift) + tl.sum(tl.exp2(b_logs - b_shift[None, :]), 0)
        b_max = b_new
    b_total = tl.where(m_m, b_total, 1.0)
    for i_d in range(0, BLOCK_D, WIDTH):
        o_d = i_d + tl.arange(0, WIDTH)
        o_out = o_row[:, None] * HEAD_DIM + o_d[None, :]
        b_out = tl.zeros([BLOCK_M, WIDTH], tl.float32)
        for i_first in range(0, num_splits, 8):
            for i in tl.static_range(8):
                i_s = i_first + i
                first = tl.cast(i_s, tl.int64) * s_split
                m_row = m_m & (o_row < tl.where(i_s < num_splits, s_split, 0))
                b_log = tl.load(log_sums + first + o_row, m_row, float("-inf"), cache_modifier=".cg")  # [BLOCK_M]
                m_part = m_row[:, None] & (o_d < HEAD_DIM)[None, :]
                b_part = tl.load(partial + first * HEAD_DIM + o_out, m_part, 0.0, cache_modifier=".cg")  # [M, WIDTH]
                # A split without keys left its part unwritten.
                b_part = tl.where((b_log == float("-inf"))[:, None], 0.0, b_part)
                b_out += b_part * tl.exp2(b_log - b_max)[:, None]
        tl.store(out + o_out, b_out / b_total[:, None], mask=m_m[:, None] & (o_d < HEAD_DIM)[None, :])


@triton.jit(do_not_specialize=["total", "num_splits"])
def join_splits_kernel(
    partial, log_sums, out, total, num_splits, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):
    """`join_splits` of BLOCK_M rows of the output a program."""
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    s_split = tl.cast(total, tl.int64)
    join_splits(partial, log_sums, out, o_row, o_row < total, s_split, num_splits, HEAD_DIM, BLOCK_M, BLOCK_D)


def join_config(head_dim: int) -> LaunchConfig:
    return LaunchConfig({"BLOCK_M": ROWS, "BLOCK_D": max(16, triton.next_power_of_2(head_dim))}, num_warps=4)
