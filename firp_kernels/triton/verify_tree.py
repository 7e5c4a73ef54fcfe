"""Verification in two launches: reduce every node's scores, then walk, one program a sequence.

The first kernel reads the scores once, one program a node and split of the vocabulary. Greedy: the split's largest
score and the first token that has it (-1 for NaN). Sampling: the split's sum in float64 and its last token of positive
probability. The second kernel walks over these partial results; to sample, it reads again the one split into which the
draw falls.

Greedy gives the oracle's integers on every input. Sampling accumulates in float64 as the oracle does, but split by
split: threshold and cumulative sums may differ from a sequential sum in the last places of a float64, so a token differs
from the oracle's only where the threshold falls that close to a cumulative sum; where the sums are exact in float64 it
never does. A row's draw depends on the row and its uniform alone, not on tree or batch: splits are of one size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from firp_kernels import checks
from firp_kernels.triton.aot import Variant
from firp_kernels.triton.launch import TYPE_NAMES, on_device_of

SPLIT = 4096
NO_TOKEN = tl.constexpr(2**31 - 1)


@triton.jit(do_not_specialize=["num_nodes", "num_splits"])
def reduce_scores_kernel(
    scores, values, tokens, s_b, s_n, s_v, num_nodes, num_splits, vocab, SPLIT: tl.constexpr, SAMPLES: tl.constexpr
):
    i_s, i_n, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_v = i_s * SPLIT + tl.arange(0, SPLIT)
    row = scores + i_b.to(tl.int64) * s_b + i_n.to(tl.int64) * s_n
    score = tl.load(row + o_v * s_v, mask=o_v < vocab, other=0.0 if SAMPLES else float("-inf")).to(values.dtype.element_ty)
    if SAMPLES:
        value = tl.sum(score, 0)
        token = tl.max(tl.where(score > 0, o_v, -1), 0)
    else:
        value = tl.max(score, 0)
        token = tl.min(tl.where(score == value, o_v, NO_TOKEN), 0)
        token = tl.where(tl.max((score != score).to(tl.int32), 0) > 0, -1, token)
    partial = (i_b.to(tl.int64) * num_nodes + i_n) * num_splits + i_s
    tl.store(values + partial, value)
    tl.store(tokens + partial, token)


@triton.jit
def _first_largest(values, tokens, num_splits, BLOCK_S: tl.constexpr):
    """The argmax of one node over its splits, the first among equals; -1 for NaN."""
    o_s = tl.arange(0, BLOCK_S)
    value = tl.load(values + o_s, mask=o_s < num_splits, other=float("-inf"))
    token = tl.load(tokens + o_s, mask=o_s < num_splits, other=NO_TOKEN)
    first = tl.min(tl.where(value == tl.max(value, 0), token, NO_TOKEN), 0)
    return tl.where(tl.min(token, 0) < 0, -1, first)


@triton.jit
def _draw(values, tokens, row, s_v, uniform, num_splits, vocab, SPLIT: tl.constexpr, BLOCK_S: tl.constexpr):
    """The first token of one node whose cumulative sum exceeds uniform * total, of positive probability; -1 for NaN."""
    o_s = tl.arange(0, BLOCK_S)
    value = tl.load(values + o_s, mask=o_s < num_splits, other=0.0)
    last_positive = tl.load(tokens + o_s, mask=o_s < num_splits, other=-1)
    cumulative = tl.cumsum(value, 0)
    total = tl.sum(tl.where(o_s == num_splits - 1, cumulative, 0.0), 0)
    threshold = uniform.to(tl.float64) * total
    i_s = tl.min(tl.where((cumulative > threshold) & (value > 0), o_s, BLOCK_S), 0)
    below = tl.sum(tl.where(o_s == i_s - 1, cumulative, 0.0), 0)

    # Cumulative sums are not quite monotonic where they are added in parallel: what no token exceeds is drawn as the
    # last one of positive probability, in the split or, without such a split, in the row.
    fallback = tl.max(tl.where((o_s == i_s) | (i_s == BLOCK_S), last_positive, -1), 0)
    fallback = tl.where(fallback < 0, vocab - 1, fallback)
    o_v = i_s * SPLIT + tl.arange(0, SPLIT)
    probability = tl.load(row + o_v * s_v, mask=o_v < vocab, other=0.0).to(tl.float64)
    exceeds = (below + tl.cumsum(probability, 0) > threshold) & (probability > 0)
    first = tl.min(tl.where(exceeds, o_v, NO_TOKEN), 0)
    return tl.where(total != total, -1, tl.where(first < NO_TOKEN, first, fallback))


@triton.jit(do_not_specialize=["num_nodes", "num_splits", "num_slots", "max_depth"])
def walk_kernel(
    scores, values, best_tokens, uniforms, tokens, parents, lookahead,
    path, num_accepted, bonus, last_node, last_slot, shift, status,
    s_b, s_n, s_v, s_ub, s_ul, s_tb, s_tn, s_pb, s_pn, s_lb, s_lp,
    num_nodes, num_splits, num_slots, max_depth, vocab,
    SPLIT: tl.constexpr, SAMPLES: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BLOCK_N)
    parent_of = tl.load(parents + i_b * s_pb + o_n * s_pn, mask=o_n < num_nodes, other=-1)
    token_of = tl.load(tokens + i_b * s_tb + o_n * s_tn, mask=o_n < num_nodes, other=-1)
    path += i_b * (max_depth + 1)

    node, child, level, choice = 0, 0, 0, -1
    while child >= 0:
        node = child
        partial = (i_b * num_nodes + node) * num_splits
        if SAMPLES:
            uniform = tl.load(uniforms + i_b * s_ub + level * s_ul)
            row = scores + i_b * s_b + node.to(tl.int64) * s_n
            choice = _draw(values + partial, best_tokens + partial, row, s_v, uniform, num_splits, vocab, SPLIT, BLOCK_S)
        else:
            choice = _first_largest(values + partial, best_tokens + partial, num_splits, BLOCK_S)
        tl.store(path + level, node)
        matches = (parent_of == node) & (token_of == choice) & (o_n > 0) & (choice >= 0) & (level < max_depth)
        child = tl.min(tl.where(matches, o_n, BLOCK_N), 0)
        child = tl.where(child < BLOCK_N, child, -1)
        level += 1
    o_d = tl.arange(0, BLOCK_D)
    tl.store(path + o_d, -1, mask=(o_d >= level) & (o_d <= max_depth))
    tl.store(num_accepted + i_b, level - 1)
    tl.store(bonus + i_b, choice)
    tl.store(last_node + i_b, node)
    tl.store(status + i_b, (choice < 0).to(tl.int32))

    o_p = tl.arange(0, BLOCK_P)
    node_of = tl.load(lookahead + i_b * s_lb + o_p * s_lp, mask=o_p < num_slots, other=-1)
    slot, levels_up = -1, 0
    while (slot < 0) & (levels_up <= max_depth) & (num_slots > 0):
        slot = tl.min(tl.where(node_of == node, o_p, BLOCK_P), 0)
        slot = tl.where(slot < BLOCK_P, slot, -1)
        levels_up += (slot < 0).to(tl.int32)
        node = tl.maximum(tl.sum(tl.where(o_n == node, parent_of, 0), 0), 0)
    tl.store(last_slot + i_b, slot)
    tl.store(shift + i_b, levels_up)


def _walk_blocks(samples: bool, vocab: int, num_nodes: int, num_slots: int, max_depth: int) -> dict[str, int]:
    sizes = {"BLOCK_S": triton.cdiv(vocab, SPLIT), "BLOCK_N": num_nodes, "BLOCK_P": max(num_slots, 1), "BLOCK_D": max_depth + 1}
    return {name: triton.next_power_of_2(size) for name, size in sizes.items()} | {"num_warps": 8 if samples else 1}


def verify_tree(
    scores: Tensor, uniforms: Tensor | None, tokens: Tensor, parents: Tensor, lookahead: Tensor, max_depth: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    checks.verify_tree(scores, uniforms, tokens, parents, lookahead, max_depth)
    with on_device_of("scores", scores, walk_kernel, checks.FLOATS):
        batch, num_nodes, vocab = scores.shape
        samples, num_splits, num_slots = uniforms is not None, triton.cdiv(vocab, SPLIT), lookahead.shape[1]
        wide = torch.float64 if samples or scores.dtype == torch.float64 else torch.float32
        values = scores.new_empty(batch, num_nodes, num_splits, dtype=wide)
        best_tokens = scores.new_empty(batch, num_nodes, num_splits, dtype=torch.int32)
        path = scores.new_empty(batch, max_depth + 1, dtype=torch.int32)
        bonus = scores.new_empty(batch, dtype=torch.int64)
        num_accepted, last_node, last_slot, shift, status = (scores.new_empty(batch, dtype=torch.int32) for _ in range(5))
        if batch:
            reduce_scores_kernel[(num_splits, num_nodes, batch)](
                scores, values, best_tokens, *scores.stride(), num_nodes, num_splits, vocab, SPLIT, samples,
                num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
            walk_kernel[(batch,)](
                scores, values, best_tokens, uniforms, tokens, parents, lookahead,
                path, num_accepted, bonus, last_node, last_slot, shift, status,
                *scores.stride(), *(uniforms.stride() if samples else (0, 0)), *tokens.stride(), *parents.stride(),
                *lookahead.stride(), num_nodes, num_splits, num_slots, max_depth, vocab, SPLIT, samples,
                **_walk_blocks(samples, vocab, num_nodes, num_slots, max_depth), enable_fp_fusion=False,
            )  # fmt: skip
    return path, num_accepted, bonus, last_node, last_slot, shift, status


def aot_variants(capability: int) -> Iterator[Variant]:
    cases = [(torch.bfloat16, False), (torch.float32, True), (torch.float32, False), (torch.float16, False), (torch.float64, False)]
    for (dtype, samples), vocab in ((case, vocab) for vocab in (128_256, 49_152) for case in cases):
        short, wide = TYPE_NAMES[dtype], "*fp64:16" if samples or dtype == torch.float64 else "*fp32:16"
        partials = {"scores": f"*{short}:16", "values": wide}
        strides = {"s_b": "i32:16", "s_n": "i32:16"}
        name = f"{short} V{vocab} {'sampling' if samples else 'greedy'}"
        constants = {"s_v": 1, "SPLIT": SPLIT, "SAMPLES": samples}
        counts = dict.fromkeys(("num_nodes", "num_splits"), "i32") | {"vocab": "i32:16"}
        yield Variant(
            name, reduce_scores_kernel, partials | {"tokens": "*i32:16"} | strides | counts, constants,
            {"num_warps": 4, "enable_fp_fusion": False},
        )  # fmt: skip
        ids = dict.fromkeys(("best_tokens", "parents", "lookahead", "path", "num_accepted", "last_node", "last_slot", "shift", "status"), "*i32:16")
        ids |= dict.fromkeys(("tokens", "bonus"), "*i64:16")
        strides |= dict.fromkeys(("s_tb", "s_pb", "s_lb"), "i32:16")
        counts |= dict.fromkeys(("num_slots", "max_depth"), "i32")
        constants |= dict.fromkeys(("s_tn", "s_pn", "s_lp"), 1)
        if samples:
            partials["uniforms"], strides["s_ub"], constants["s_ul"] = "*fp32:16", "i32", 1
        else:
            constants |= {"uniforms": None, "s_ub": 0, "s_ul": 0}
        blocks = _walk_blocks(samples, vocab, 64, 64, 3)
        options = {"num_warps": blocks.pop("num_warps"), "enable_fp_fusion": False}
        yield Variant(name, walk_kernel, partials | ids | strides | counts, constants | blocks, options)
