"""Tree attention: flash decoding over the committed context, then the tree by its bitmasks, in one walk over slots.

A program owns BLOCK_M query rows (tree rows and the query heads of one group, packed) and one split of the slots that
those rows can see: the context, the nodes, and the chains of pseudo rows of the tile's own lookahead slots. Blocks that
lie wholly in the context need no mask. With more than one split a second kernel joins the partial results.

Letters as in `ops.py`; scores are in units of log2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from firp_kernels import checks
from firp_kernels.triton.aot import Variant
from firp_kernels.triton.attention_config import attention_config, split_count
from firp_kernels.triton.launch import FLOATS, TYPE_NAMES, multiprocessors, on_device_of

WORD = tl.constexpr(32)
RUNTIME = ["batch", "rows", "heads", "num_nodes", "words", "num_slots", "num_offsets", "window", "num_tiles", "num_splits"]
# The tensor cores' short float32 would not be float32.
PRECISION = {torch.float16: None, torch.bfloat16: None, torch.float32: "ieee"}
JOIN_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def _visible(
    o_c, column, chain_first, node, pseudo, position, depths, ancestors, num_nodes, words, num_offsets, window,
    WINDOWED: tl.constexpr,
):  # fmt: skip
    """What rows see of the WORD columns from `column` on: negative ones are the context, then come the nodes, then the
    pseudo rows from `chain_first` on."""
    b_c = column + o_c
    is_node = (b_c >= 0) & (b_c < num_nodes)
    # The ancestor bits of these columns lie in two words; a row without a node has none.
    i_w = tl.where(node >= 0, column >> 5, -2)
    p_w = ancestors + node * words + i_w
    b_w = tl.load(p_w, mask=(i_w >= 0) & (i_w < words), other=0)
    b_next = tl.load(p_w + 1, mask=(i_w >= -1) & (i_w < words - 1), other=0)
    b_bits = b_w.to(tl.uint32, bitcast=True).to(tl.uint64) | (b_next.to(tl.uint32, bitcast=True).to(tl.uint64) << WORD)
    b_bits = (b_bits >> (column & (WORD - 1))).to(tl.uint32)
    ancestor = ((b_bits[:, None] >> o_c[None, :]) & 1 != 0) & is_node[None, :]
    # Of the pseudo rows a row sees its own chain up to itself.
    b_pseudo = b_c - num_nodes + chain_first
    own_first = pseudo // num_offsets * num_offsets
    own = (b_pseudo[None, :] >= own_first[:, None]) & (b_pseudo[None, :] <= pseudo[:, None])
    visible = (b_c < 0)[None, :] | ancestor | ((b_c >= num_nodes)[None, :] & own)
    if WINDOWED:
        b_depth = tl.load(depths + b_c, mask=is_node, other=0)
        distance = position[:, None] - tl.where(is_node, b_depth, b_c)[None, :]
        distance = tl.where((b_c >= num_nodes)[None, :], pseudo[:, None] - b_pseudo[None, :], distance)
        visible = visible & (distance < window)
    return visible


@triton.jit
def _attend(b_q, b_k, b_v, b_out, b_max, b_sum, visible, scale, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """Take one block of keys and values into the running softmax."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
    if MASKED:
        # A weight of 0 does not stop a NaN: values enter the product clean, and a bad one reaches by its score
        # only the rows that see it.
        finite = tl.abs(b_v) < float("inf")
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

    # Of the tile's blocks [start, stop), [first, last) lie in the context and in every row's window (a position is at
    # most num_nodes - 1 + num_offsets behind the context): no mask. This split takes [low, high).
    start, first = 0, 0
    last = context // BLOCK_N
    if WINDOWED:
        start = tl.maximum(context + 1 - window, 0) // BLOCK_N
        first = tl.minimum(tl.cdiv(tl.maximum(context + num_nodes + num_offsets - window, 0), BLOCK_N), last)
    stop = tl.cdiv(num_keys, BLOCK_N)
    share = tl.cdiv(stop - start, num_splits)
    low = start + i_s * share
    high = tl.minimum(low + share, stop)
    if low >= high:
        tl.store(log_sums + p_out, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=live)
        return

    p_q = query + i_b.to(tl.int64) * stride_q_b + o_r[:, None].to(tl.int64) * stride_q_r + o_h[:, None].to(tl.int64) * stride_q_h
    b_q = tl.load(p_q + o_d[None, :] * stride_q_d, mask=live[:, None] & inside[None, :], other=0.0)
    p_k = key_cache + i_b.to(tl.int64) * stride_k_b + i_h.to(tl.int64) * stride_k_h
    p_v = value_cache + i_b.to(tl.int64) * stride_v_b + i_h.to(tl.int64) * stride_v_h
    o_k = o_n[:, None] * stride_k_s + o_d[None, :] * stride_k_d
    o_v = o_n[:, None] * stride_v_s + o_d[None, :] * stride_v_d
    p_depths, p_ancestors = depths + i_b * num_nodes, ancestors + i_b * num_nodes * words
    b_out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)

    for i_n in range(tl.maximum(low, first), tl.minimum(high, last)):
        slot = tl.cast(i_n, tl.int64) * BLOCK_N
        b_k = tl.load(p_k + slot * stride_k_s + o_k, mask=inside[None, :], other=0.0)
        b_v = tl.load(p_v + slot * stride_v_s + o_v, mask=inside[None, :], other=0.0)
        b_out, b_max, b_sum = _attend(b_q, b_k, b_v, b_out, b_max, b_sum, live, scale, False, PRECISION)

    # A row's number among the pseudo rows (negative: a node row), its node (-1: none), and its position behind the
    # context.
    pseudo = o_r - num_nodes
    is_pseudo = live & (pseudo >= 0)
    slot_node = tl.load(lookahead + i_b * num_slots + pseudo // num_offsets, mask=is_pseudo, other=-1)
    node = tl.where(is_pseudo, slot_node, tl.where(live, o_r, -1))
    position = tl.load(p_depths + node, mask=node >= 0, other=0) + tl.where(is_pseudo, pseudo % num_offsets + 1, 0)

    # What is left lies behind the unmasked blocks and, with a window, before them; walked in blocks of one mask word.
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
            visible = _visible(
                o_c, column, chain_first, node, pseudo, position, p_depths, p_ancestors, num_nodes, words, num_offsets,
                window, WINDOWED,
            )  # fmt: skip
            slot = (first_slot + o_c + tl.where(column + o_c >= num_nodes, chain_first, 0)).to(tl.int64)[:, None]
            filled = (column + o_c < num_keys - context)[:, None] & inside[None, :]
            b_k = tl.load(p_k + slot * stride_k_s + o_d[None, :] * stride_k_d, mask=filled, other=0.0)
            b_v = tl.load(p_v + slot * stride_v_s + o_d[None, :] * stride_v_d, mask=filled, other=0.0)
            b_out, b_max, b_sum = _attend(b_q, b_k, b_v, b_out, b_max, b_sum, visible, scale, True, PRECISION)

    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_out = b_out / b_sum[:, None]
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
    batch, rows, heads, width = query.shape
    capacity, kv_heads = key_cache.shape[1:3]
    group = heads // kv_heads
    with on_device_of("query", query, tree_attention_kernel) as capability:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        if not out.numel():
            return out
        config = attention_config(rows * group, width, query.element_size(), capability)
        tiles = triton.cdiv(rows * group, config.block_m)
        reach = capacity if sliding_window is None else min(capacity, sliding_window + rows)
        splits = split_count(tiles * kv_heads * batch, triton.cdiv(reach, config.block_n), config, multiprocessors(query))
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
            PRECISION=PRECISION[query.dtype], **config.tile, **config.options,
        )  # fmt: skip
        if splits > 1:
            join_splits_kernel[(batch * rows * heads,)](
                partial, log_sums, out, batch * rows * heads, splits,
                WIDTH=width, BLOCK_S=triton.next_power_of_2(splits), BLOCK_D=config.block_d, **JOIN_OPTIONS,
            )  # fmt: skip
    return out


def aot_variants(capability: int) -> Iterator[Variant]:
    """Variants of both kernels for `aot`: all dtypes and widths, few and many rows, split and whole, windowed or not."""
    few, tree, many = (1, 1), (64, 4), (128, 1)
    shapes = [(torch.bfloat16, 128, tree, True, False), (torch.bfloat16, 128, few, True, True), (torch.float32, 128, few, True, False)]
    shapes += [(torch.bfloat16, 128, few, True, False), (torch.bfloat16, 128, tree, True, True), (torch.bfloat16, 128, many, False, False)]
    shapes += [(dtype, 128, few, False, True) for dtype in FLOATS]
    shapes += [(torch.bfloat16, width, (32, 4), True, False) for width in (64, 128, 256)]
    shapes += [(dtype, width, few, True, False) for dtype in FLOATS for width in (64, 80, 96, 256)]
    shapes += [(dtype, width, tree, False, False) for dtype in FLOATS[:2] for width in (64, 96, 256)]
    shapes += [(dtype, width, many, True, False) for dtype in FLOATS[:2] for width in (64, 96)]
    pointers = dict.fromkeys(("context_lens", "depths", "ancestors", "lookahead"), "*i32:16")
    strides = {name: "i32:16" for name in tree_attention_kernel.arg_names if name.startswith("stride") and name[-1] != "d"}
    for dtype, width, (packed_rows, group), split, windowed in shapes:
        config, short = attention_config(packed_rows, width, dtype.itemsize, capability), TYPE_NAMES[dtype]
        written = "*fp32:16" if split else f"*{short}:16"
        yield Variant(
            f"{short} D{width} M{packed_rows}{' split' * split}{' window' * windowed}",
            tree_attention_kernel,
            dict.fromkeys(("query", "key_cache", "value_cache"), f"*{short}:16")
            | pointers | {"out": written, "log_sums": written} | strides | dict.fromkeys(RUNTIME, "i32") | {"scale": "fp32"},
            {"stride_q_d": 1, "stride_k_d": 1, "stride_v_d": 1, "GROUP": group, "WIDTH": width, "WINDOWED": windowed,
             "SPLIT": split, "PRECISION": PRECISION[dtype], **config.tile},
            config.options,
        )  # fmt: skip
    for dtype, width, splits in ((torch.bfloat16, 128, 8), (torch.float16, 256, 64), (torch.float32, 80, 33)):
        config, short = attention_config(1, width, dtype.itemsize, capability), TYPE_NAMES[dtype]
        yield Variant(
            f"{short} D{width} splits{splits}",
            join_splits_kernel,
            {"partial": "*fp32:16", "log_sums": "*fp32:16", "out": f"*{short}:16", "total": "i32", "num_splits": "i32"},
            {"WIDTH": width, "BLOCK_S": triton.next_power_of_2(splits), "BLOCK_D": config.block_d},
            JOIN_OPTIONS,
        )
