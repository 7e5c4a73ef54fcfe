"""Lookup in one launch of one program a sequence: the text grows, is searched, and a branch is added to the tree."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from firp_kernels.bitmask import num_words
from firp_kernels.ops.lookup_branch import GrownTree, check, fake
from firp_kernels.triton.launch import LaunchConfig, meta, on_device_of

# Earlier ends that are compared together.
BLOCK_S = 1024


@triton.jit
def longest_match_block(p_text, s_text, last, slots, o_s, MOST_MATCH: tl.constexpr):
    """The best of some ends `o_s` as length * slots + end: the longest, then the latest. All loads may be under way at
    once."""
    b_alive = o_s < last
    b_length = tl.zeros_like(o_s)
    for i in tl.static_range(MOST_MATCH):
        own = tl.load(p_text + tl.maximum(last - i, 0) * s_text)  # []
        m_s = b_alive & (o_s >= i)
        b_text = tl.load(p_text + (o_s - i) * s_text, mask=m_s, other=0)  # [BLOCK_S]
        b_alive = m_s & (b_text == own)
        b_length += b_alive.to(tl.int64)
    return tl.max(tl.where(b_length > 0, b_length * slots + o_s, 0), 0)


@triton.jit(
    do_not_specialize=[
        "slots", "width", "count", "num_branch", "least_match", "num_replaced", "words", "old_words"
    ]
)  # fmt: skip
def lookup_branch_kernel(
    history, context_lens, emitted, counts, tokens, parents, depths, ancestors,
    out_tokens, out_parents, out_depths, out_ancestors,
    s_text_b, s_text_s, slots, width, count, num_branch, least_match, num_replaced, words, old_words,
    MOST_MATCH: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """out = the tree and the nodes that follow its root where the text occurred before: one sequence a program."""
    i_b = tl.program_id(0).to(tl.int64)
    p_text = history + i_b * s_text_b
    last = tl.load(context_lens + i_b).to(tl.int64)  # []
    emits = tl.load(counts + i_b)  # []
    o_e = tl.arange(0, BLOCK_E)
    b_new = tl.load(emitted + i_b * width + o_e, mask=o_e < width, other=0)  # [BLOCK_E]
    b_place = last + 1 - emits + o_e
    tl.store(p_text + b_place * s_text_s, b_new, mask=(o_e < emits) & (b_place >= 0) & (b_place < slots))
    tl.debug_barrier()  # other threads read what these wrote

    best = tl.zeros((), tl.int64)
    for start in range(0, last, BLOCK_S):
        o_s = (start + tl.arange(0, BLOCK_S)).to(tl.int64)
        best = tl.maximum(best, longest_match_block(p_text, s_text_s, last, slots, o_s, MOST_MATCH))
    end = best % slots
    found = best // slots >= least_match
    loop = tl.maximum(last - end, 1)

    o_n, o_w = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_W)
    m_n, nodes = o_n < count, count + num_branch - num_replaced
    b_token = tl.load(tokens + i_b * count + o_n, mask=m_n, other=0)  # [BLOCK_N]
    b_parent = tl.load(parents + i_b * count + o_n, mask=m_n, other=-1)  # [BLOCK_N]
    b_depth = tl.load(depths + i_b * count + o_n, mask=m_n, other=0)  # [BLOCK_N]
    m_old = m_n[:, None] & (o_w < old_words)[None, :]
    p_old = ancestors + (i_b * count + o_n[:, None]) * old_words + o_w[None, :]
    b_self = tl.where(o_n[:, None] // 32 == o_w[None, :], 1 << (o_n[:, None] % 32), 0)
    b_mask = tl.where(m_n[:, None], tl.load(p_old, mask=m_old, other=0), b_self)  # [BLOCK_N, BLOCK_W]

    kept = count - num_replaced
    node, used = tl.zeros((), tl.int32), kept
    for depth in range(num_branch):
        place = tl.minimum(end + 1 + depth % loop, slots - 1)
        token = tl.load(p_text + place * s_text_s)  # []
        m_held = (b_parent == node) & (b_token == token) & (o_n < used) & (o_n > 0)
        child = tl.min(tl.where(m_held, o_n, BLOCK_N), 0)
        adds = found & (child == BLOCK_N)
        to = tl.where(child == BLOCK_N, used, child)
        m_node, m_to = o_n == node, (o_n == to) & adds
        level = tl.sum(tl.where(m_node, b_depth, 0), 0) + 1
        b_above = tl.sum(tl.where(m_node[:, None], b_mask, 0), 0)  # [BLOCK_W]
        b_token = tl.where(m_to, token, b_token)
        b_parent = tl.where(m_to, node, b_parent)
        b_depth = tl.where(m_to, level, b_depth)
        b_mask = tl.where(m_to[:, None], b_self | b_above[None, :], b_mask)
        used += adds.to(tl.int32)
        node = tl.where(found, to, node)

    m_gone = (o_n >= used) & (used > kept)
    b_token, b_depth = tl.where(m_gone, 0, b_token), tl.where(m_gone, 0, b_depth)
    b_parent, b_mask = tl.where(m_gone, -1, b_parent), tl.where(m_gone[:, None], b_self, b_mask)

    p_out, m_out = i_b * nodes + o_n, o_n < nodes
    tl.store(out_tokens + p_out, b_token, mask=m_out)
    tl.store(out_parents + p_out, b_parent, mask=m_out)
    tl.store(out_depths + p_out, b_depth, mask=m_out)
    m_words = m_out[:, None] & (o_w < words)[None, :]
    tl.store(out_ancestors + p_out[:, None] * words + o_w[None, :], b_mask, mask=m_words)


def launch_config(width: int, nodes: int, words: int, most_match: int) -> LaunchConfig:
    """Eight warps: the search is the work, and few registers of a thread hold its loads."""
    sizes = {"E": max(width, 1), "N": nodes, "W": words}
    tile = {f"BLOCK_{axis}": triton.next_power_of_2(size) for axis, size in sizes.items()}
    return LaunchConfig({"MOST_MATCH": most_match, "BLOCK_S": BLOCK_S} | tile, num_warps=8)


def lookup_branch(
    history: Tensor, context_lens: Tensor, emitted: Tensor, counts: Tensor, tokens: Tensor, parents: Tensor,
    depths: Tensor, ancestors: Tensor, num_branch: int, least_match: int, most_match: int, num_replaced: int = 0,
) -> GrownTree:  # fmt: skip
    """`firp_kernels.lookup_branch` on a CUDA device."""
    args = history, context_lens, emitted, counts, tokens, parents, depths, ancestors
    sizes = num_branch, least_match, most_match, num_replaced
    check(*args, *sizes)
    with on_device_of("history", history, lookup_branch_kernel, (torch.int64,)):
        grown = fake(*args, *sizes)
        batch, count = tokens.shape
        nodes = count + num_branch - num_replaced
        words = num_words(nodes)
        if batch:
            lookup_branch_kernel[(batch,)](
                history, *(tensor.contiguous() for tensor in args[1:]), *grown, *history.stride(), history.shape[1],
                emitted.shape[1], count, num_branch, least_match, num_replaced, words, ancestors.shape[2],
                **launch_config(emitted.shape[1], nodes, words, most_match).keywords,
            )  # fmt: skip
    return grown


def aot_calls() -> Iterator[tuple]:
    """Arguments of launches for `aot`."""
    for nodes, num_branch, num_replaced, width in ((8, 4, 4, 5), (1, 8, 0, 1), (64, 8, 0, 9), (64, 8, 8, 9)):
        history, lens = meta(1, 4096, dtype=torch.int64), meta(1, dtype=torch.int32)
        tokens = meta(1, nodes, dtype=torch.int64)
        emitted, counts = meta(1, width, dtype=torch.int64), meta(1, dtype=torch.int64)
        row = meta(1, nodes, dtype=torch.int32)
        masks = meta(1, nodes, num_words(nodes), dtype=torch.int32)
        yield history, lens, emitted, counts, tokens, row, row, masks, num_branch, 2, 8, num_replaced
