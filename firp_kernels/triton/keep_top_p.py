"""Nucleus sampling without a sort: a row's threshold is searched for over its scores, one launch for all rows.

A score becomes an int32 key of the same order. Each pass over a row adds up the probabilities of all tokens up to three
keys, and keeps the quarter of the range in which the sum passes 1 - top_p. It ends where one score is left, after eight
passes for scores that were 16-bit numbers and at most sixteen for others. Sums are float64 and of one fixed order, so
that a row does not depend on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from firp_kernels.ops.keep_top_p import check
from firp_kernels.triton.launch import LaunchConfig, meta, on_device_of

LARGEST = tl.constexpr(2**31 - 1)
# Blocks of a row that are read at a time: one alone would leave the multiprocessor waiting for the level-2 cache, and
# four take more registers than there are.
UNROLL = tl.constexpr(2)


@triton.jit
def _key(b_score):
    """int32 of the same order; both zeros are one score."""
    b_bits = tl.where(b_score == 0.0, 0.0, b_score).to(tl.int32, bitcast=True)
    return tl.where(b_bits < 0, b_bits ^ LARGEST, b_bits)


@triton.jit
def _taken(b_score, m_taken, peak):
    """exp(score - peak) of the tokens that are taken, float64."""
    return tl.where(m_taken, tl.exp(b_score - peak), 0.0).to(tl.float64)


@triton.jit
def _up_to(p_row, vocab, peak, key, BLOCK: tl.constexpr):
    """Sum of exp(score - peak), and number, of the tokens with keys up to `key`."""
    b_sum, b_count = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.int32)
    for i_v in tl.range(0, vocab, BLOCK, loop_unroll_factor=UNROLL):
        o_v = i_v + tl.arange(0, BLOCK)
        b_score = tl.load(p_row + o_v, mask=o_v < vocab, other=float("-inf"))  # [BLOCK]
        m_taken = (_key(b_score) <= key) & (o_v < vocab)
        b_sum += _taken(b_score, m_taken, peak)
        b_count += m_taken.to(tl.int32)
    return tl.sum(b_sum, 0), tl.sum(b_count, 0)


@triton.jit(do_not_specialize=["rest", "min_tokens_to_keep", "filter_value"])
def keep_top_p_kernel(scores, out, s_scores_r, vocab, rest, min_tokens_to_keep, filter_value, BLOCK: tl.constexpr):
    """out = scores, or filter_value for the first tokens, in ascending order, that have at most `rest`: one row a
    program."""
    i_r = tl.program_id(0).to(tl.int64)
    p_row, p_out = scores + i_r * s_scores_r, out + i_r * vocab
    b_peak = tl.full([BLOCK], float("-inf"), tl.float32)
    for i_v in tl.range(0, vocab, BLOCK, loop_unroll_factor=UNROLL):
        o_v = i_v + tl.arange(0, BLOCK)
        b_score = tl.load(p_row + o_v, mask=o_v < vocab, other=float("-inf"))  # [BLOCK]
        b_peak = tl.maximum(b_peak, b_score)
    peak = tl.max(b_peak, 0)
    total, _ = _up_to(p_row, vocab, peak, LARGEST, BLOCK)
    broken = total != total
    # At most `most` tokens are left out. It is not negative, or the search would not end.
    limit, most = total * rest, tl.maximum(vocab - min_tokens_to_keep, 0)

    # Tokens up to `low` are left out, those up to `high` are not all; `least` and `greatest` are keys in between.
    low = tl.cast(-LARGEST - 1, tl.int64)
    high = tl.where(broken, -LARGEST, _key(peak)).to(tl.int64)
    least, greatest = tl.cast(-LARGEST, tl.int32), high.to(tl.int32)
    while least != greatest:
        second = low + (high - low) // 2
        first, third = low + (high - low) // 4, tl.minimum(high - (high - low) // 4, high - 1)
        key_1, key_2, key_3 = first.to(tl.int32), second.to(tl.int32), third.to(tl.int32)
        b_sum_1, b_count_1 = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.int32)
        b_sum_2, b_count_2 = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.int32)
        b_sum_3, b_count_3 = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.int32)
        b_least, b_greatest = tl.full([BLOCK], LARGEST, tl.int32), tl.full([BLOCK], -LARGEST, tl.int32)
        for i_v in tl.range(0, vocab, BLOCK, loop_unroll_factor=UNROLL):
            o_v = i_v + tl.arange(0, BLOCK)
            b_score = tl.load(p_row + o_v, mask=o_v < vocab, other=float("-inf"))  # [BLOCK]
            b_key = tl.where(o_v < vocab, _key(b_score), LARGEST)
            b_exp = _taken(b_score, b_key != LARGEST, peak)
            b_sum_1 += tl.where(b_key <= key_1, b_exp, 0.0)
            b_sum_2 += tl.where(b_key <= key_2, b_exp, 0.0)
            b_sum_3 += tl.where(b_key <= key_3, b_exp, 0.0)
            b_count_1 += (b_key <= key_1).to(tl.int32)
            b_count_2 += (b_key <= key_2).to(tl.int32)
            b_count_3 += (b_key <= key_3).to(tl.int32)
            b_least = tl.minimum(b_least, tl.where(b_key > low.to(tl.int32), b_key, LARGEST))
            b_greatest = tl.maximum(b_greatest, tl.where(b_key <= high.to(tl.int32), b_key, -LARGEST))
        least, greatest = tl.min(b_least, 0), tl.max(b_greatest, 0)
        m_1 = (tl.sum(b_sum_1, 0) > limit) | (tl.sum(b_count_1, 0) > most)
        m_2 = (tl.sum(b_sum_2, 0) > limit) | (tl.sum(b_count_2, 0) > most)
        m_3 = (tl.sum(b_sum_3, 0) > limit) | (tl.sum(b_count_3, 0) > most)
        low = tl.where(m_1, low, tl.where(m_2, first, tl.where(m_3, second, third)))
        high = tl.where(m_1, first, tl.where(m_2, second, tl.where(m_3, third, high)))

    # Of the equal scores at the threshold the first are left out while the sum allows.
    left_sum, left_count = _up_to(p_row, vocab, peak, greatest - 1, BLOCK)
    threshold = tl.where(greatest < 0, greatest ^ LARGEST, greatest).to(tl.float32, bitcast=True)
    own = tl.maximum(tl.exp(threshold - peak).to(tl.float64), 1e-300)
    ties = tl.minimum(tl.floor((limit - left_sum) / own), (most - left_count).to(tl.float64)).to(tl.int32)
    seen = tl.cast(0, tl.int32)
    for i_v in range(0, vocab, BLOCK):
        o_v = i_v + tl.arange(0, BLOCK)
        b_score = tl.load(p_row + o_v, mask=o_v < vocab, other=float("-inf"))  # [BLOCK]
        b_tie = ((_key(b_score) == greatest) & (o_v < vocab)).to(tl.int32)
        m_keep = (_key(b_score) > greatest) | ((b_tie > 0) & (seen + tl.cumsum(b_tie, 0) > ties))
        b_kept = tl.where(m_keep, b_score, filter_value)
        tl.store(p_out + o_v, tl.where(broken, b_score, b_kept), mask=o_v < vocab)
        seen += tl.sum(b_tie, 0)


def launch_config(vocab: int) -> LaunchConfig:
    """A row belongs to one multiprocessor: 16 warps, of which each thread takes four numbers of a block."""
    block = min(2048, max(128, triton.next_power_of_2(vocab)))
    return LaunchConfig({"BLOCK": block}, num_warps=block // 128)


def keep_top_p(scores: Tensor, top_p: float, min_tokens_to_keep: int, filter_value: float) -> Tensor:
    """`firp_kernels.keep_top_p` on a CUDA device."""
    check(scores, top_p, min_tokens_to_keep)
    with on_device_of("scores", scores, keep_top_p_kernel, (torch.float32,)):
        out = torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)
        rows = scores if scores.stride(1) == 1 else scores.contiguous()
        if scores.numel():
            keep_top_p_kernel[(len(rows),)](
                rows, out, rows.stride(0), rows.shape[1], 1 - top_p, min_tokens_to_keep, filter_value,
                **launch_config(rows.shape[1]).keywords,
            )  # fmt: skip
    return out


def aot_calls() -> Iterator[tuple]:
    """Arguments of launches for `aot`."""
    for vocab in (128_256, 997):
        yield meta(4, vocab, dtype=torch.float32), 0.9, 1, float("-inf")
