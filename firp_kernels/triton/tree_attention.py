"""Tree attention: flash decoding over the committed context, then the tree by its bitmasks, in one walk over slots.

A program owns BLOCK_M query rows (tree rows and the query heads of one group, packed) and one split of the slots that
those rows can see: the context, the nodes, and the chains of pseudo rows of the tile's own lookahead slots. Blocks that
lie wholly in the context need no mask. With more than one split a second kernel joins the partial results.

Letters as in `ops.py`; scores are in units of log2.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from firp_kernels import checks
from firp_kernels.triton import launch
from firp_kernels.triton.attention_config import attention_config, split_count

RUNTIME = ["batch", "rows", "heads", "num_nodes", "words", "num_slots", "num_offsets", "window", "num_tiles", "num_splits"]


@triton.jit
def _attend(b_q, b_k, b_v, b_out, b_max, b_sum, visible, scale, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """Take one block of keys and values into the running softmax."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
    if MASKED:
        # A weight of 0 does not stop a NaN: values enter the product clean, and a bad one reaches by its score
        # only the rows that see it.
        finite = tl.abs(b_v.to(tl.float32)) < float("inf")
        b_v = tl.where(finite, b_v, 0.0)
        b_s += tl.sum(tl.where(finite, 0.0, float("nan")), 1)[None, :]
        b_s = tl.where(visible, b_s, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_p = tl.exp2(b_s - b_shift[:, None])
    b_scale = tl.exp2(b_max - b_shift)
    b_sum = b_sum * b_scale + tl.sum(b_p, 1)
    b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out * b_scale[:, None], input_precision=PRECISION)
    return b_out, b_new, b_sum


@triton.jit(do_not_specialize=RUNTIME)
def tree_attention_kernel(
    query, key_cache, value_cache, context_lens, depths, ancestors, lookahead, out, log_sums,
    stride_q_b, stride_q_r, stride_q_h, stride_q_d,
    stride_k_b, stride_k_s, stride_k_h, stride_k_d,
    stride_v_b, stride_v_s, stride_v_h, stride_v_d,
    batch, rows, heads, num_nodes, words, num_slots, num_offsets, window, num_tiles, num_splits, scale,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, WINDOWED: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_m, i_s = tl.program_id(0) % num_tiles, tl.program_id(0) // num_tiles
    i_h, i_b = tl.program_id(1), tl.program_id(2)
    o_n, o_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    inside = o_d < WIDTH

    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_r, o_h = o_m // GROUP, i_h * GROUP + o_m % GROUP
    live = o_r < rows
    p_out = (i_s * batch + i_b).to(tl.int64) * rows * heads + o_r * heads + o_h

    # The tile's pseudo rows see the chains [chain_first, chain_stop) of all pseudo rows.
    context = tl.load(context_lens + i_b)
    first_row = i_m * BLOCK_M // GROUP
    last_row = tl.minimum((i_m * BLOCK_M + BLOCK_M - 1) // GROUP, rows - 1)
    chain_first = tl.maximum(first_row - num_nodes, 0) // num_offsets * num_offsets
    chain_stop = chain_first
    if last_row >= num_nodes:
        chain_stop = (last_row - num_nodes) // num_offsets * num_offsets + num_offsets
    num_keys = context + num_nodes + chain_stop - chain_first

    # Blocks [start, full) need no mask, [full, stop) do; this split takes [low, high) of both.
    start = 0
    full = context // BLOCK_N
    if WINDOWED:
        start = tl.maximum(context + 1 - window, 0) // BLOCK_N
        full = start
    stop = tl.cdiv(num_keys, BLOCK_N)
    share = tl.cdiv(stop - start, num_splits)
    low = start + i_s * share
    high = tl.minimum(low + share, stop)
    if SPLIT:
        if low >= high:
            tl.store(log_sums + p_out, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=live)
            return

    p_q = query + i_b.to(tl.int64) * stride_q_b + o_r[:, None].to(tl.int64) * stride_q_r + o_h[:, None] * stride_q_h
    b_q = tl.load(p_q + o_d[None, :] * stride_q_d, mask=live[:, None] & inside[None, :], other=0.0)
    p_k = key_cache + i_b.to(tl.int64) * stride_k_b + i_h.to(tl.int64) * stride_k_h
    p_v = value_cache + i_b.to(tl.int64) * stride_v_b + i_h.to(tl.int64) * stride_v_h
    o_k = o_n[:, None] * stride_k_s + o_d[None, :] * stride_k_d
    o_v = o_n[:, None] * stride_v_s + o_d[None, :] * stride_v_d
    b_out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)

    for i_n in range(low, tl.minimum(high, full)):
        slot = tl.cast(i_n, tl.int64) * BLOCK_N
        b_k = tl.load(p_k + slot * stride_k_s + o_k, mask=inside[None, :], other=0.0)
        b_v = tl.load(p_v + slot * stride_v_s + o_v, mask=inside[None, :], other=0.0)
        b_out, b_max, b_sum = _attend(b_q, b_k, b_v, b_out, b_max, b_sum, live, scale, False, PRECISION)

    # A row's node, its number among the pseudo rows (negative: a node row), where its own chain starts, and its
    # position behind the context.
    pseudo = o_r - num_nodes
    chain = pseudo // num_offsets
    is_pseudo = live & (pseudo >= 0)
    slot_node = tl.load(lookahead + i_b * num_slots + chain, mask=is_pseudo, other=-1)
    node = tl.where(is_pseudo, slot_node, tl.where(live, o_r, -1))
    position = tl.load(depths + i_b * num_nodes + node, mask=node >= 0, other=0)
    position += tl.where(is_pseudo, pseudo % num_offsets + 1, 0)
    p_bits = ancestors + (i_b * num_nodes + node) * words

    # A block of the masked part is as wide as a word of ancestors.
    o_n = tl.arange(0, 32)
    for i_n in range(tl.maximum(low, full) * (BLOCK_N // 32), tl.minimum(high * (BLOCK_N // 32), tl.cdiv(num_keys, 32))):
        # Columns: negative in the context, then the nodes, then the chains of this tile.
        column = i_n * 32 + o_n - context
        is_node = (column >= 0) & (column < num_nodes)
        behind = column >= num_nodes
        other = chain_first + column - num_nodes
        i_w = (i_n * 32 - context) >> 5
        b_low = tl.load(p_bits + i_w, mask=(node >= 0) & (i_w >= 0) & (i_w < words), other=0)
        b_high = tl.load(p_bits + i_w + 1, mask=(node >= 0) & (i_w >= -1) & (i_w + 1 < words), other=0)
        b_bits = (b_high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | b_low.to(tl.uint32, bitcast=True).to(tl.uint64)
        b_bits = (b_bits >> ((i_n * 32 - context) & 31)).to(tl.uint32)
        seen = ((b_bits[:, None] >> o_n[None, :]) & 1 != 0) & is_node[None, :]
        own = (other[None, :] >= (chain * num_offsets)[:, None]) & (other[None, :] <= pseudo[:, None]) & behind[None, :]
        visible = (column < 0)[None, :] | seen | own
        if WINDOWED:
            depth = tl.load(depths + i_b * num_nodes + column, mask=is_node, other=0)
            distance = position[:, None] - tl.where(is_node, depth, column)[None, :]
            distance = tl.where(behind[None, :], pseudo[:, None] - other[None, :], distance)
            visible = visible & (distance < window)

        slot = tl.cast(i_n, tl.int64) * 32
        o_s = (o_n + tl.where(behind, chain_first, 0))[:, None]
        filled = (column < num_keys - context)[:, None] & inside[None, :]
        b_k = tl.load(p_k + slot * stride_k_s + (o_s * stride_k_s + o_d[None, :] * stride_k_d), mask=filled, other=0.0)
        b_v = tl.load(p_v + slot * stride_v_s + (o_s * stride_v_s + o_d[None, :] * stride_v_d), mask=filled, other=0.0)
        b_out, b_max, b_sum = _attend(b_q, b_k, b_v, b_out, b_max, b_sum, visible, scale, True, PRECISION)

    b_out = b_out / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
    tl.store(out + p_out[:, None] * WIDTH + o_d[None, :], b_out, mask=live[:, None] & inside[None, :])
    if SPLIT:
        tl.store(log_sums + p_out, b_max + tl.log2(b_sum), mask=live)


@triton.jit(do_not_specialize=["total", "num_splits"])
def join_splits_kernel(
    partial, log_sums, out, total, num_splits, WIDTH: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr
):
    """One row of the output: its splits' results, weighted by their shares of the softmax's sum."""
    i_t = tl.program_id(0).to(tl.int64)
    o_s, o_d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    p_split = o_s.to(tl.int64) * total + i_t
    b_log = tl.load(log_sums + p_split, mask=o_s < num_splits, other=float("-inf"))
    used = b_log != float("-inf")
    b_part = tl.load(
        partial + p_split[:, None] * WIDTH + o_d[None, :], mask=used[:, None] & (o_d < WIDTH)[None, :], other=0.0
    )
    b_max = tl.max(b_log, 0)
    b_weight = tl.where(used, tl.exp2(b_log - b_max), 0.0)
    b_out = tl.sum(b_part * b_weight[:, None], 0) / tl.sum(b_weight, 0)
    tl.store(out + i_t * WIDTH + o_d, b_out, mask=o_d < WIDTH)


def tree_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    context_lens: Tensor,
    depths: Tensor,
    ancestors: Tensor,
    lookahead: Tensor,
    num_offsets: int,
    scale: float,
    sliding_window: int | None = None,
) -> Tensor:
    """`ops.tree_attention` on a CUDA device, in one launch, or two where the keys are split."""
    checks.tree_attention(
        query, key_cache, value_cache, context_lens, depths, ancestors, lookahead, num_offsets, sliding_window
    )
    if query.dtype == torch.float64:
        raise TypeError("query: got dtype torch.float64, expected torch.float16, torch.bfloat16 or torch.float32")
    batch, rows, heads, width = query.shape
    capacity, kv_heads = key_cache.shape[1:3]
    group = heads // kv_heads
    with launch.on_device_of("query", query):
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        if not out.numel():
            return out
        target = launch.target(query)
        config = attention_config(rows * group, width, query.element_size(), target.capability)
        tiles = triton.cdiv(rows * group, config.block_m)
        key_blocks = triton.cdiv(capacity if sliding_window is None else min(capacity, sliding_window + rows), config.block_n)
        splits = split_count(tiles * kv_heads * batch, key_blocks, config, target.multiprocessors)
        partial, log_sums = out, out
        if splits > 1:
            partial = torch.empty(splits, *query.shape, dtype=torch.float32, device=query.device)
            log_sums = torch.empty(splits, batch, rows, heads, dtype=torch.float32, device=query.device)
        tree_attention_kernel[(tiles * splits, kv_heads, batch)](
            query, key_cache, value_cache, context_lens.contiguous(), depths.contiguous(), ancestors.contiguous(),
            lookahead.contiguous(), partial, log_sums,
            *query.stride(), *key_cache.stride(), *value_cache.stride(),
            batch, rows, heads, depths.shape[1], ancestors.shape[2], lookahead.shape[1], max(num_offsets, 1),
            sliding_window or 0, tiles, splits, scale * math.log2(math.e),
            GROUP=group, WIDTH=width, WINDOWED=sliding_window is not None, SPLIT=splits > 1,
            PRECISION="ieee" if query.dtype == torch.float32 else None,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_D=config.block_d,
            num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=launch.FP_FUSION,
        )  # fmt: skip
        if splits > 1:
            join_splits_kernel[(batch * rows * heads,)](
                partial, log_sums, out, batch * rows * heads, splits,
                WIDTH=width, BLOCK_S=triton.next_power_of_2(splits), BLOCK_D=config.block_d,
                num_warps=4, enable_fp_fusion=launch.FP_FUSION,
            )  # fmt: skip
    return out
