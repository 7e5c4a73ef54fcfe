"""The most probable tokens of some rows in two launches: the largest of every split, then the largest of these.

A score and its token make one int64 key: larger for a larger score, and among equals for the lower token. The largest
keys are then the contract's candidates in order. Each split also leaves its peak and its sum of exp(score - peak),
from which the second kernel makes the softmax.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from firp_kernels.ops.top_marginals import check, fake, reference
from firp_kernels.triton.launch import FLOATS, LaunchConfig, meta, on_device_of

# Ranks are found one after another: for more of them torch's sort is faster.
MAX_RANKS = 64
LAST_TOKEN = tl.constexpr(2**31 - 1)
NO_KEY = tl.constexpr(-(2**63))


@triton.jit
def _key(b_score, o_v):
    """int64 that orders by score, then by the lower token; both zeros are one score."""
    b_bits = tl.where(b_score == 0.0, 0.0, b_score).to(tl.int32, bitcast=True)
    b_order = tl.where(b_bits < 0, b_bits ^ LAST_TOKEN, b_bits)
    return (b_order.to(tl.int64) << 32) | (o_v ^ LAST_TOKEN).to(tl.int64)


@triton.jit
def _score_of(key):
    order = (key >> 32).to(tl.int32)
    return tl.where(order < 0, order ^ LAST_TOKEN, order).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["num_splits", "num_ranks"])
def reduce_scores_kernel(
    logits, rows, keys, peaks, sums, s_logits_b, s_logits_r, s_logits_v, s_rows_b, s_rows_k, num_splits, num_ranks,
    vocab, SPLIT: tl.constexpr,
):  # fmt: skip
    """The num_ranks largest keys, max and sum(exp(score - max)) of logits[b, rows[b, i], split]: one split a
    program."""
    i_s, i_k, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_v = i_s * SPLIT + tl.arange(0, SPLIT)
    m_v = o_v < vocab
    row = tl.load(rows + i_b * s_rows_b + i_k * s_rows_k)  # []
    p_row = logits + i_b * s_logits_b + row * s_logits_r
    b_score = tl.load(p_row + o_v * s_logits_v, mask=m_v, other=float("-inf")).to(tl.float32)  # [SPLIT]
    partial = (i_b * tl.num_programs(1) + i_k) * num_splits + i_s

    peak = tl.max(b_score, 0)
    b_exp = tl.where(b_score == float("-inf"), 0.0, tl.exp(b_score - peak))
    tl.store(peaks + partial, peak)
    tl.store(sums + partial, tl.sum(b_exp, 0))

    b_key = tl.where(m_v, _key(b_score, o_v), NO_KEY)
    for i in range(num_ranks):
        best = tl.max(b_key, 0)
        tl.store(keys + partial * num_ranks + i, best)
        b_key = tl.where(b_key == best, NO_KEY, b_key)


@triton.jit(do_not_specialize=["num_splits", "num_ranks"])
def merge_kernel(
    keys, peaks, sums, probabilities, candidates, num_splits, num_ranks, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr
):
    """exp(score - max) / sum of the num_ranks largest keys among those of all splits: one row a program."""
    i_row = tl.program_id(0).to(tl.int64)
    o_s = tl.arange(0, BLOCK_S)
    m_s = o_s < num_splits
    b_peak = tl.load(peaks + i_row * num_splits + o_s, mask=m_s, other=float("-inf"))  # [BLOCK_S]
    b_sum = tl.load(sums + i_row * num_splits + o_s, mask=m_s, other=0.0)  # [BLOCK_S]
    peak = tl.max(b_peak, 0)
    total = tl.sum(b_sum * tl.where(b_peak == float("-inf"), 0.0, tl.exp(b_peak - peak)), 0)

    o_c = tl.arange(0, BLOCK_C)
    num_keys = num_splits * num_ranks
    b_key = tl.load(keys + i_row * num_keys + o_c, mask=o_c < num_keys, other=NO_KEY)  # [BLOCK_C]
    for i in range(num_ranks):
        best = tl.max(b_key, 0)
        probability = tl.exp(_score_of(best) - peak) / total
        tl.store(probabilities + i_row * num_ranks + i, tl.where(probability == probability, probability, 0.0))
        tl.store(candidates + i_row * num_ranks + i, (best & LAST_TOKEN) ^ LAST_TOKEN)
        b_key = tl.where(b_key == best, NO_KEY, b_key)


def launch_config(vocab: int, num_ranks: int) -> tuple[LaunchConfig, LaunchConfig]:
    """Of the reduction, and of the merge, whose keys are at most a 64th of the vocabulary."""
    split = max(1024, 64 * triton.next_power_of_2(num_ranks))
    splits = triton.cdiv(vocab, split)
    blocks = {"BLOCK_S": triton.next_power_of_2(splits), "BLOCK_C": triton.next_power_of_2(splits * num_ranks)}
    return LaunchConfig({"SPLIT": split}, 4), LaunchConfig(blocks, 4 if blocks["BLOCK_C"] <= 1024 else 8)


def top_marginals(logits: Tensor, rows: Tensor, num_ranks: int) -> tuple[Tensor, Tensor]:
    """`firp_kernels.top_marginals` on a CUDA device."""
    if num_ranks > MAX_RANKS or logits.dtype == torch.float64:
        return reference(logits, rows, num_ranks)
    check(logits, rows, num_ranks)
    with on_device_of("logits", logits, merge_kernel, FLOATS):
        (batch, count), vocab = rows.shape, logits.shape[2]
        probabilities, candidates = fake(logits, rows, num_ranks)
        reduction, merge = launch_config(vocab, num_ranks)
        num_splits = triton.cdiv(vocab, reduction.tile["SPLIT"])
        keys = logits.new_empty(batch, count, num_splits, num_ranks, dtype=torch.int64)
        peaks = logits.new_empty(batch, count, num_splits, dtype=torch.float32)
        sums = torch.empty_like(peaks)
        if rows.numel():
            reduce_scores_kernel[(num_splits, count, batch)](
                logits, rows, keys, peaks, sums, *logits.stride(), *rows.stride(), num_splits, num_ranks, vocab,
                **reduction.keywords,
            )  # fmt: skip
            merge_kernel[(batch * count,)](
                keys, peaks, sums, probabilities, candidates, num_splits, num_ranks, **merge.keywords
            )
    return probabilities, candidates


def aot_calls() -> Iterator[tuple]:
    """Arguments of launches for `aot`."""
    for vocab, num_ranks, dtype in (
        (128_256, 16, torch.bfloat16), (49_152, 16, torch.float32), (256_000, MAX_RANKS, torch.bfloat16),
        (32_000, 16, torch.float16), (49_152, 1, torch.bfloat16),
    ):  # fmt: skip
        yield meta(1, 48, vocab, dtype=dtype), meta(1, 3, dtype=torch.int64), num_ranks
