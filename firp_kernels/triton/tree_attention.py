"""Tree attention: flash decoding over the committed context, then the tree by its bitmasks, in one walk over slots.

A program owns BLOCK_M query rows (tree rows and the query heads of one group, packed) and one split of the slots that
those rows can see: the context, the nodes, and the chains of pseudo rows of the tile's own lookahead slots. Blocks that
are wholly in the context need no mask. The splits of a tile are joined by the last of its programs to come, or by a
second kernel (`attention_join`).

Letters as in `firp_kernels.ops`; scores are in units of log2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from firp_kernels.ops.tree_attention import check
from firp_kernels.triton.arrivals import take_arrivals
from firp_kernels.triton.attention_config import FILLED, launch_config, split_count
from firp_kernels.triton.attention_join import join_config, join_splits, join_splits_kernel, joins_in_place
from firp_kernels.triton.launch import FLOATS, meta, multiprocessors, on_device_of

WORD = tl.constexpr(32)
RUNTIME = [
    "batch", "rows", "heads", "num_nodes", "words", "num_slots", "num_offsets", "window", "num_tiles", "num_splits",
]  # fmt: skip
# The tensor cores' short float32 would not be float32.
PRECISION = {torch.float16: None, torch.bfloat16: None, torch.float32: "ieee"}


@triton.jit
def _visible(
    o_c, column, chain_first, b_node, b_pseudo, b_position, p_depths, p_ancestors, num_nodes, words, num_offsets,
    window, WINDOWED: tl.constexpr,
):  # fmt: skip
    """What the rows see of the WORD columns from `column` on, [BLOCK_M, WORD].

    Negative columns are the context, then come the nodes, then the pseudo rows from `chain_first` on.
    """
    b_c = column + o_c
    m_is_node = (b_c >= 0) & (b_c < num_nodes)
    # The ancestor bits of these columns are in two words; a row without a node has none.
    i_w = tl.where(b_node >= 0, column >> 5, -2)
    p_w = p_ancestors + b_node * words + i_w
    b_w = tl.load(p_w, mask=(i_w >= 0) & (i_w < words), other=0)  # [BLOCK_M]
    b_next = tl.load(p_w + 1, mask=(i_w >= -1) & (i_w < words - 1), other=0)  # [BLOCK_M]
    b_bits = b_w.to(tl.uint32, bitcast=True).to(tl.uint64) | (b_next.to(tl.uint32, bitcast=True).to(tl.uint64) << WORD)
    b_bits = (b_bits >> (column & (WORD - 1))).to(tl.uint32)
    m_ancestor = ((b_bits[:, None] >> o_c[None, :]) & 1 != 0) & m_is_node[None, :]
    # Of the pseudo rows a row sees its own chain up to itself.
    b_chain = b_c - num_nodes + chain_first
    b_first = b_pseudo // num_offsets * num_offsets
    m_own = (b_chain[None, :] >= b_first[:, None]) & (b_chain[None, :] <= b_pseudo[:, None])
    m_visible = (b_c < 0)[None, :] | m_ancestor | ((b_c >= num_nodes)[None, :] & m_own)
    if WINDOWED:
        b_depth = tl.load(p_depths + b_c, mask=m_is_node, other=0)  # [WORD]
        b_distance = b_position[:, None] - tl.where(m_is_node, b_depth, b_c)[None, :]
        b_distance = tl.where((b_c >= num_nodes)[None, :], b_pseudo[:, None] - b_chain[None, :], b_distance)
        m_visible = m_visible & (b_distance < window)
    return m_visible


@triton.jit
def _attend(b_q, b_k, b_v, b_out, b_max, b_sum, m_visible, scale, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """Take one block of keys and values into the running softmax."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
    if MASKED:
        # A weight of 0 does not stop a NaN: values enter the product clean, and a bad one reaches by its score
        # only the rows that see it.
        m_finite = tl.abs(b_v) < float("inf")
        b_v = tl.where(m_finite, b_v, 0.0)
        b_s += tl.sum(tl.where(m_finite, 0.0, float("nan")), 1)[None, :]
        b_s = tl.where(m_visible, b_s, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_p = tl.exp2(b_s - b_shift[:, None])
    b_scale = tl.exp2(b_max - b_shift)
    b_sum = b_sum * b_scale + tl.sum(b_p, 1)
    b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out * b_scale[:, None], input_precision=PRECISION)
    return b_out, b_new, b_sum


@triton.jit(do_not_specialize=RUNTIME)
def tree_attention_kernel(
    query, key_cache, value_cache, context_lens, depths, ancestors, lookahead, out, partial, log_sums, arrivals,
    s_query_b, s_query_r, s_query_h, s_query_d,
    s_key_cache_b, s_key_cache_s, s_key_cache_h, s_key_cache_d,
    s_value_cache_b, s_value_cache_s, s_value_cache_h, s_value_cache_d,
    batch, rows, heads, num_nodes, words, num_slots, num_offsets, window, num_tiles, num_splits, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WINDOWED: tl.constexpr, SPLIT: tl.constexpr, JOIN: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """softmax(query . key * scale under the tree's mask) @ value.

    BLOCK_M packed rows of one key/value head and one split of their slots a program. It leaves its share in `partial`
    and the log of its sum in `log_sums`. Under JOIN `arrivals` [B, Hkv, tiles] counts the splits that are done.
    """
    i_m, i_s = tl.program_id(0) % num_tiles, tl.program_id(0) // num_tiles
    i_h, i_b = tl.program_id(1), tl.program_id(2)
    o_n, o_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    m_d = o_d < HEAD_DIM

    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_r, o_h = o_m // GROUP, i_h * GROUP + o_m % GROUP
    m_m = o_r < rows
    o_row = i_b.to(tl.int64) * rows * heads + o_r * heads + o_h

    # The tile's pseudo rows see the chains [chain_first, chain_stop) of all pseudo rows.
    context = tl.load(context_lens + i_b)  # []
    first_row = i_m * BLOCK_M // GROUP
    last_row = tl.minimum((i_m * BLOCK_M + BLOCK_M - 1) // GROUP, rows - 1)
    chain_first = tl.maximum(first_row - num_nodes, 0) // num_offsets * num_offsets
    chain_stop = chain_first
    if last_row >= num_nodes:
        chain_stop = (last_row - num_nodes) // num_offsets * num_offsets + num_offsets
    num_keys = context + num_nodes + chain_stop - chain_first

    # Of the tile's blocks [start, stop), [first, last) are in the context and in every row's window (a position is at
    # most num_nodes - 1 + num_offsets after the context): no mask. This split takes [low, high), or nothing.
    start, first = 0, 0
    last = context // BLOCK_N
    if WINDOWED:
        start = tl.maximum(context + 1 - window, 0) // BLOCK_N
        first = tl.minimum(tl.cdiv(tl.maximum(context + num_nodes + num_offsets - window, 0), BLOCK_N), last)
    stop = tl.cdiv(num_keys, BLOCK_N)
    share = tl.cdiv(stop - start, num_splits)
    low = start + i_s * share
    high = tl.minimum(low + share, stop)

    p_q = query + i_b.to(tl.int64) * s_query_b + o_r[:, None].to(tl.int64) * s_query_r
    p_q += o_h[:, None].to(tl.int64) * s_query_h + o_d[None, :] * s_query_d
    b_q = tl.load(p_q, mask=m_m[:, None] & m_d[None, :], other=0.0)  # [BLOCK_M, BLOCK_D]
    p_k = key_cache + i_b.to(tl.int64) * s_key_cache_b + i_h.to(tl.int64) * s_key_cache_h
    p_v = value_cache + i_b.to(tl.int64) * s_value_cache_b + i_h.to(tl.int64) * s_value_cache_h
    o_k = o_n[:, None] * s_key_cache_s + o_d[None, :] * s_key_cache_d
    o_v = o_n[:, None] * s_value_cache_s + o_d[None, :] * s_value_cache_d
    p_depths, p_ancestors = depths + i_b * num_nodes, ancestors + i_b * num_nodes * words
    b_out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)

    for i_n in range(tl.maximum(low, first), tl.minimum(high, last)):
        slot = tl.cast(i_n, tl.int64) * BLOCK_N
        b_k = tl.load(p_k + slot * s_key_cache_s + o_k, mask=m_d[None, :], other=0.0)  # [BLOCK_N, BLOCK_D]
        b_v = tl.load(p_v + slot * s_value_cache_s + o_v, mask=m_d[None, :], other=0.0)  # [BLOCK_N, BLOCK_D]
        b_out, b_max, b_sum = _attend(b_q, b_k, b_v, b_out, b_max, b_sum, m_m, scale, False, PRECISION)

    # A row's number among the pseudo rows (negative: a node row), its node (-1: none), its position after the context.
    b_pseudo = o_r - num_nodes
    m_pseudo = m_m & (b_pseudo >= 0)
    b_slot_node = tl.load(lookahead + i_b * num_slots + b_pseudo // num_offsets, mask=m_pseudo, other=-1)  # [BLOCK_M]
    b_node = tl.where(m_pseudo, b_slot_node, tl.where(m_m, o_r, -1))
    b_depth = tl.load(p_depths + b_node, mask=b_node >= 0, other=0)  # [BLOCK_M]
    b_position = b_depth + tl.where(m_pseudo, b_pseudo % num_offsets + 1, 0)

    # What is left is after the unmasked blocks and, with a window, before them; walked in blocks of one mask word.
    o_c = tl.arange(0, WORD)
    for i_part in tl.static_range(2 if WINDOWED else 1):
        if i_part == 0:
            part_low = tl.maximum(low, last) * (BLOCK_N // WORD)
            part_high = tl.minimum(high * (BLOCK_N // WORD), tl.cdiv(num_keys, WORD))
        else:
            part_low = low * (BLOCK_N // WORD)
            part_high = tl.minimum(high, first) * (BLOCK_N // WORD)
        for i_c in range(part_low, part_high):
            first_slot = tl.cast(i_c, tl.int32) * WORD
            column = first_slot - context
            m_visible = _visible(
                o_c, column, chain_first, b_node, b_pseudo, b_position, p_depths, p_ancestors, num_nodes, words,
                num_offsets, window, WINDOWED,
            )  # fmt: skip
            o_slot = (first_slot + o_c + tl.where(column + o_c >= num_nodes, chain_first, 0)).to(tl.int64)[:, None]
            m_filled = (column + o_c < num_keys - context)[:, None] & m_d[None, :]
            p_column_k = p_k + o_slot * s_key_cache_s + o_d[None, :] * s_key_cache_d
            p_column_v = p_v + o_slot * s_value_cache_s + o_d[None, :] * s_value_cache_d
            b_k = tl.load(p_column_k, mask=m_filled, other=0.0)  # [WORD, BLOCK_D]
            b_v = tl.load(p_column_v, mask=m_filled, other=0.0)  # [WORD, BLOCK_D]
            b_out, b_max, b_sum = _attend(b_q, b_k, b_v, b_out, b_max, b_sum, m_visible, scale, True, PRECISION)

    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_out = b_out / b_sum[:, None]
    if SPLIT:
        s_split = tl.cast(batch, tl.int64) * rows * heads
        o_part = i_s * s_split + o_row
        m_part = (o_r < tl.where(low < high, rows, 0))[:, None] & m_d[None, :]
        tl.store(partial + o_part[:, None] * HEAD_DIM + o_d[None, :], b_out, mask=m_part)
        tl.store(log_sums + o_part, b_max + tl.log2(b_sum), mask=m_m)
        if JOIN:
            # One thread counts for all: what the others wrote comes before it.
            tl.debug_barrier()
            p_arrived = arrivals + (i_b * tl.num_programs(1) + i_h) * num_tiles + i_m
            arrived = tl.atomic_add(p_arrived, 1, sem="acq_rel", scope="gpu")
            if arrived == num_splits - 1:
                tl.store(p_arrived, 0)
                join_splits(partial, log_sums, out, o_row, m_m, s_split, num_splits, HEAD_DIM, BLOCK_M, BLOCK_D)
    else:
        tl.store(out + o_row[:, None] * HEAD_DIM + o_d[None, :], b_out, mask=m_m[:, None] & m_d[None, :])


def tree_attention(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, context_lens: Tensor, depths: Tensor, ancestors: Tensor,
    lookahead: Tensor, num_offsets: int, scale: float, sliding_window: int | None = None,
) -> Tensor:  # fmt: skip
    """`firp_kernels.tree_attention` on a CUDA device: one launch, or two where a tile's splits are many bytes."""
    check(query, key_cache, value_cache, context_lens, depths, ancestors, lookahead, num_offsets, scale, sliding_window)
    batch, rows, heads, head_dim = query.shape
    capacity, kv_heads = key_cache.shape[1:3]
    group = heads // kv_heads
    with on_device_of("query", query, tree_attention_kernel) as capability:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        if not out.numel():
            return out
        config = launch_config(rows * group, head_dim, query.element_size(), capability)
        tiles = triton.cdiv(rows * group, config.tile["BLOCK_M"])
        reach = FILLED * capacity if sliding_window is None else min(FILLED * capacity, sliding_window + rows)
        blocks = math.ceil(reach / config.tile["BLOCK_N"])
        splits = split_count(tiles * kv_heads * batch, blocks, config, multiprocessors(query))
        join = splits > 1 and joins_in_place(splits, min(rows * group, config.tile["BLOCK_M"]), head_dim)
        partial, log_sums, arrivals = out, out, out
        if splits > 1:
            partial = torch.empty(splits, *query.shape, dtype=torch.float32, device=query.device)
            log_sums = torch.empty(splits, batch, rows, heads, dtype=torch.float32, device=query.device)
        if join:
            arrivals = take_arrivals(batch * kv_heads * tiles, query.device)
        tree_attention_kernel[(tiles * splits, kv_heads, batch)](
            query, key_cache, value_cache, context_lens.contiguous(), depths.contiguous(), ancestors.contiguous(),
            lookahead.contiguous(), out, partial, log_sums, arrivals,
            *query.stride(), *key_cache.stride(), *value_cache.stride(),
            batch, rows, heads, depths.shape[1], ancestors.shape[2], lookahead.shape[1], max(num_offsets, 1),
            sliding_window or 0, tiles, splits, scale * math.log2(math.e),
            GROUP=group, HEAD_DIM=head_dim, WINDOWED=sliding_window is not None, SPLIT=splits > 1,
            JOIN=join, PRECISION=PRECISION[query.dtype], **config.keywords,
        )  # fmt: skip
        if splits > 1 and not join:
            total, own = batch * rows * heads, join_config(head_dim)
            join_splits_kernel[(triton.cdiv(total, own.tile["BLOCK_M"]),)](
                partial, log_sums, out, total, splits, HEAD_DIM=head_dim, **own.keywords
            )
    return out


def aot_calls() -> Iterator[tuple]:
    """Arguments of launches for `aot`: all dtypes and heads, few and many rows, split and whole, windowed or not."""
    few, tree, many = (1, 1), (16, 4), (128, 1)
    half = FLOATS[:2]
    # Sequences: keys of one are split many times, of some in two that are joined in place, of many not at all.
    one, some, busy, kv_heads = 1, 16, 256, 8
    shapes = [(torch.bfloat16, 128, tree, one, None), (torch.bfloat16, 128, few, one, 1024)]
    shapes += [(torch.float32, 128, few, one, None), (torch.bfloat16, 128, few, one, None)]
    shapes += [(torch.bfloat16, 128, tree, one, 1024), (torch.bfloat16, 128, many, busy, None)]
    shapes += [(torch.bfloat16, 128, tree, some, window) for window in (None, 1024)]
    shapes += [(dtype, 128, few, busy, 1024) for dtype in FLOATS]
    shapes += [(torch.bfloat16, head_dim, (8, 4), one, None) for head_dim in (64, 128, 256)]
    shapes += [(dtype, head_dim, few, one, None) for dtype in FLOATS for head_dim in (64, 80, 96, 256)]
    shapes += [(dtype, head_dim, tree, busy, None) for dtype in half for head_dim in (64, 96, 256)]
    shapes += [(dtype, head_dim, many, one, None) for dtype in half for head_dim in (64, 96)]
    for dtype, head_dim, (rows, group), batch, window in shapes:
        query = meta(batch, rows, kv_heads * group, head_dim, dtype=dtype)
        cache = meta(2, batch, 8192, kv_heads, head_dim, dtype=dtype)
        lens, depths = meta(batch, dtype=torch.int32), meta(batch, rows, dtype=torch.int32)
        ancestors = meta(batch, rows, triton.cdiv(rows, 32), dtype=torch.int32)
        lookahead = meta(batch, 0, dtype=torch.int32)
        yield query, cache[0], cache[1], lens, depths, ancestors, lookahead, 3, head_dim**-0.5, window
