"""Verification in two launches: reduce every node's scores, then walk, one program a sequence.

The first kernel reads the scores once, one program a node and split of the vocabulary. Greedy: the split's largest
score and the first token that has it (-1 for NaN). Sampling: the split's sum in float64 and its last token of positive
probability. The second kernel walks over these partial results; to sample, it reads again the one split into which the
draw falls.

Greedy gives the oracle's integers on every input. Sampling accumulates in float64 as the oracle does, but split by
split: threshold and cumulative sums may differ from a sequential sum in the last places of a float64. A token differs
from the oracle's only where the threshold falls that close to a cumulative sum, and never where the sums are exact in
float64. A row's draw depends on the row and its uniform alone, not on tree or batch: splits are of one size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from firp_kernels.checks import FLOATS
from firp_kernels.ops.verify_tree import Verified, check, fake
from firp_kernels.triton.launch import LaunchConfig, meta, on_device_of

# Scores of one program of the reduction.
SPLIT = 4096
NO_TOKEN = tl.constexpr(2**31 - 1)


@triton.jit(do_not_specialize=["num_nodes", "num_splits"])
def reduce_scores_kernel(
    scores, values, tokens, s_scores_b, s_scores_n, s_scores_v, num_nodes, num_splits, vocab,
    SAMPLES: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """(max, first argmax) of scores[b, n, split], or to sample (sum, last positive token): one split a program."""
    i_s, i_n, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_v = i_s * SPLIT + tl.arange(0, SPLIT)
    p_row = scores + i_b.to(tl.int64) * s_scores_b + i_n.to(tl.int64) * s_scores_n
    b_score = tl.load(p_row + o_v * s_scores_v, mask=o_v < vocab, other=0.0 if SAMPLES else float("-inf"))  # [SPLIT]
    b_score = b_score.to(values.dtype.element_ty)
    if SAMPLES:
        value = tl.sum(b_score, 0)
        token = tl.max(tl.where(b_score > 0, o_v, -1), 0)
    else:
        value = tl.max(b_score, 0)
        token = tl.min(tl.where(b_score == value, o_v, NO_TOKEN), 0)
        token = tl.where(tl.max((b_score != b_score).to(tl.int32), 0) > 0, -1, token)
    partial = (i_b.to(tl.int64) * num_nodes + i_n) * num_splits + i_s
    tl.store(values + partial, value)
    tl.store(tokens + partial, token)


@triton.jit
def _first_largest(values, tokens, num_splits, BLOCK_S: tl.constexpr):
    """The argmax of one node over its splits, the first among equals; -1 for NaN."""
    o_s = tl.arange(0, BLOCK_S)
    b_value = tl.load(values + o_s, mask=o_s < num_splits, other=float("-inf"))  # [BLOCK_S]
    b_token = tl.load(tokens + o_s, mask=o_s < num_splits, other=NO_TOKEN)  # [BLOCK_S]
    first = tl.min(tl.where(b_value == tl.max(b_value, 0), b_token, NO_TOKEN), 0)
    return tl.where(tl.min(b_token, 0) < 0, -1, first)


@triton.jit
def _draw(values, tokens, p_row, s_scores_v, uniform, num_splits, vocab, SPLIT: tl.constexpr, BLOCK_S: tl.constexpr):
    """The first token of one node whose cumulative sum exceeds uniform * total, of positive probability; -1 for NaN."""
    o_s = tl.arange(0, BLOCK_S)
    b_value = tl.load(values + o_s, mask=o_s < num_splits, other=0.0)  # [BLOCK_S]
    b_last = tl.load(tokens + o_s, mask=o_s < num_splits, other=-1)  # [BLOCK_S], the last positive token
    b_sum = tl.cumsum(b_value, 0)
    total = tl.sum(tl.where(o_s == num_splits - 1, b_sum, 0.0), 0)
    threshold = uniform.to(tl.float64) * total
    i_s = tl.min(tl.where((b_sum > threshold) & (b_value > 0), o_s, BLOCK_S), 0)
    below = tl.sum(tl.where(o_s == i_s - 1, b_sum, 0.0), 0)

    # Cumulative sums are not quite monotonic where they are added in parallel: what no token exceeds is drawn as the
    # last one of positive probability, in the split or, without such a split, in the row.
    fallback = tl.max(tl.where((o_s == i_s) | (i_s == BLOCK_S), b_last, -1), 0)
    fallback = tl.where(fallback < 0, vocab - 1, fallback)
    o_v = i_s * SPLIT + tl.arange(0, SPLIT)
    b_p = tl.load(p_row + o_v * s_scores_v, mask=o_v < vocab, other=0.0).to(tl.float64)  # [SPLIT]
    m_exceeds = (below + tl.cumsum(b_p, 0) > threshold) & (b_p > 0)
    first = tl.min(tl.where(m_exceeds, o_v, NO_TOKEN), 0)
    return tl.where(total != total, -1, tl.where(first < NO_TOKEN, first, fallback))


@triton.jit(do_not_specialize=["num_nodes", "num_splits", "num_slots", "max_depth"])
def walk_kernel(
    scores, values, best_tokens, uniforms, tokens, parents, lookahead,
    path, num_accepted, bonus, last_slot, levels_up, status,
    s_scores_b, s_scores_n, s_scores_v, s_uniforms_b, s_uniforms_l, s_tokens_b, s_tokens_n, s_parents_b, s_parents_n,
    s_lookahead_b, s_lookahead_p,
    num_nodes, num_splits, num_slots, max_depth, vocab,
    SAMPLES: tl.constexpr, SPLIT: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_L: tl.constexpr,
):  # fmt: skip
    """node = the first child that holds choice(node), from the root until there is none: one sequence a program.

    Then the nearest of the last node and its ancestors that has a lookahead slot, `levels_up` above it.
    """
    i_b = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BLOCK_N)
    m_n = o_n < num_nodes
    b_parent = tl.load(parents + i_b * s_parents_b + o_n * s_parents_n, mask=m_n, other=-1)  # [BLOCK_N]
    b_token = tl.load(tokens + i_b * s_tokens_b + o_n * s_tokens_n, mask=m_n, other=-1)  # [BLOCK_N]
    p_path = path + i_b * (max_depth + 1)

    node, child, level, choice = 0, 0, 0, -1
    while child >= 0:
        node = child
        partial = (i_b * num_nodes + node) * num_splits
        if SAMPLES:
            uniform = tl.load(uniforms + i_b * s_uniforms_b + level * s_uniforms_l)  # []
            p_row = scores + i_b * s_scores_b + node.to(tl.int64) * s_scores_n
            choice = _draw(
                values + partial, best_tokens + partial, p_row, s_scores_v, uniform, num_splits, vocab, SPLIT, BLOCK_S
            )
        else:
            choice = _first_largest(values + partial, best_tokens + partial, num_splits, BLOCK_S)
        tl.store(p_path + level, node)
        m_match = (b_parent == node) & (b_token == choice) & (o_n > 0) & (choice >= 0) & (level < max_depth)
        child = tl.min(tl.where(m_match, o_n, BLOCK_N), 0)
        child = tl.where(child < BLOCK_N, child, -1)
        level += 1
    o_l = tl.arange(0, BLOCK_L)
    tl.store(p_path + o_l, -1, mask=(o_l >= level) & (o_l <= max_depth))
    tl.store(num_accepted + i_b, level - 1)
    tl.store(bonus + i_b, choice)
    tl.store(status + i_b, (choice < 0).to(tl.int32))

    o_p = tl.arange(0, BLOCK_P)
    p_lookahead = lookahead + i_b * s_lookahead_b + o_p * s_lookahead_p
    b_node = tl.load(p_lookahead, mask=o_p < num_slots, other=-1)  # [BLOCK_P]
    slot, up = -1, 0
    while (slot < 0) & (up <= max_depth) & (num_slots > 0):
        slot = tl.min(tl.where(b_node == node, o_p, BLOCK_P), 0)
        slot = tl.where(slot < BLOCK_P, slot, -1)
        up += (slot < 0).to(tl.int32)
        node = tl.maximum(tl.sum(tl.where(o_n == node, b_parent, 0), 0), 0)
    tl.store(last_slot + i_b, slot)
    tl.store(levels_up + i_b, up)


def launch_config(
    samples: bool, vocab: int, num_nodes: int, num_slots: int, max_depth: int
) -> tuple[LaunchConfig, LaunchConfig]:
    """Of the reduction, and of the walk. Neither fuses multiply-adds: a draw sums as it is written."""
    sizes = {"S": triton.cdiv(vocab, SPLIT), "N": num_nodes, "P": max(num_slots, 1), "L": max_depth + 1}
    blocks = {f"BLOCK_{axis}": triton.next_power_of_2(size) for axis, size in sizes.items()}
    split = {"SPLIT": SPLIT}
    return LaunchConfig(split, 4, fp_fusion=False), LaunchConfig(split | blocks, 8 if samples else 1, fp_fusion=False)


def verify_tree(
    scores: Tensor, uniforms: Tensor | None, tokens: Tensor, parents: Tensor, lookahead: Tensor, max_depth: int
) -> Verified:
    """`firp_kernels.verify_tree` on a CUDA device."""
    check(scores, uniforms, tokens, parents, lookahead, max_depth)
    with on_device_of("scores", scores, walk_kernel, FLOATS):
        batch, num_nodes, vocab = scores.shape
        samples, num_splits, num_slots = uniforms is not None, triton.cdiv(vocab, SPLIT), lookahead.shape[1]
        wide = torch.float64 if samples or scores.dtype == torch.float64 else torch.float32
        values = scores.new_empty(batch, num_nodes, num_splits, dtype=wide)
        best_tokens = scores.new_empty(batch, num_nodes, num_splits, dtype=torch.int32)
        verified = fake(scores, uniforms, tokens, parents, lookahead, max_depth)
        reduction, walk = launch_config(samples, vocab, num_nodes, num_slots, max_depth)
        if batch:
            reduce_scores_kernel[(num_splits, num_nodes, batch)](
                scores, values, best_tokens, *scores.stride(), num_nodes, num_splits, vocab, samples,
                **reduction.keywords,
            )  # fmt: skip
            walk_kernel[(batch,)](
                scores, values, best_tokens, uniforms, tokens, parents, lookahead, *verified,
                *scores.stride(), *((0, 0) if uniforms is None else uniforms.stride()), *tokens.stride(),
                *parents.stride(),
                *lookahead.stride(), num_nodes, num_splits, num_slots, max_depth, vocab, samples, **walk.keywords,
            )  # fmt: skip
    return verified


def aot_calls() -> Iterator[tuple]:
    """Arguments of launches for `aot`."""
    cases = [(torch.bfloat16, False), (torch.float32, True), (torch.float32, False)]
    cases += [(torch.float16, False), (torch.float64, False)]
    for vocab, (dtype, samples) in itertools.product((128_256, 49_152), cases):
        uniforms = meta(1, 4, dtype=torch.float32) if samples else None
        parents = meta(1, 64, dtype=torch.int32)
        tokens, lookahead = meta(1, 64, dtype=torch.int64), meta(1, 64, dtype=torch.int32)
        yield meta(1, 64, vocab, dtype=dtype), uniforms, tokens, parents, lookahead, 3
