"""Emission in one launch of one warp a sequence: about forty small torch calls of a step."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from firp_kernels.ops.emit_tokens import Emitted, check, fake
from firp_kernels.triton.launch import LaunchConfig, meta, on_device_of


@triton.jit(do_not_specialize=["width", "num_stops", "num_offsets", "num_embeddings", "max_context"])
def emit_tokens_kernel(
    path, num_accepted, bonus, last_slot, levels_up, status, tokens, stop_tokens, context_lens, finished, remaining,
    out_tokens, counts, kept, out_finished, root, rows, usable, packed,
    s_tokens_b, s_tokens_n, width, num_stops, num_offsets, num_embeddings, max_context,
    BLOCK_L: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """tokens[path[1:]] and the bonus, cut after the first stop token and at the limit: one sequence a program."""
    i_b = tl.program_id(0).to(tl.int64)
    accepted = tl.load(num_accepted + i_b)  # []
    choice = tl.load(bonus + i_b)  # []
    flag = tl.load(status + i_b)  # []
    broken = flag != 0
    was_finished = tl.load(finished + i_b) != 0  # []
    left = tl.load(remaining + i_b)  # []

    o_l = tl.arange(0, BLOCK_L)
    m_l = o_l + 1 < width
    b_node = tl.maximum(tl.load(path + i_b * width + o_l + 1, mask=m_l, other=0), 0)  # [BLOCK_L]
    p_token = tokens + i_b * s_tokens_b + b_node.to(tl.int64) * s_tokens_n
    b_token = tl.where(o_l == accepted, choice, tl.load(p_token, mask=m_l, other=-1))  # [BLOCK_L]
    o_t = tl.arange(0, BLOCK_T)
    m_t = o_t < num_stops
    b_stop = tl.load(stop_tokens + o_t, mask=m_t, other=-1)  # [BLOCK_T]
    m_stop = (b_token[:, None] == b_stop[None, :]) & m_t[None, :]
    b_stops = tl.max(m_stop.to(tl.int32), 1)

    count = tl.minimum(accepted.to(tl.int64) + 1, left)
    count = tl.where(was_finished | broken, 0, count)
    first = tl.min(tl.where((b_stops > 0) & (o_l < count), o_l, BLOCK_L), 0)
    stopped = first < BLOCK_L
    count = tl.where(stopped, (first + 1).to(tl.int64), count)
    left -= count
    committed = tl.maximum(count - 1, 0).to(tl.int32)
    length = tl.load(context_lens + i_b)  # []
    full = length + committed + 1 > max_context
    done = (was_finished | broken | stopped | full | (left == 0)).to(tl.int64)

    b_token = tl.where(o_l < count, b_token, -1)
    p_packed = packed + i_b * (width + 3)
    tl.store(out_tokens + i_b * width + o_l, b_token, mask=o_l < width)
    tl.store(p_packed + o_l, b_token, mask=o_l < width)
    tl.store(p_packed + width, count)
    tl.store(p_packed + width + 1, done)
    tl.store(p_packed + width + 2, flag.to(tl.int64))
    tl.store(remaining + i_b, left)
    tl.store(counts + i_b, count)
    tl.store(kept + i_b, committed)
    tl.store(out_finished + i_b, done.to(tl.uint8))

    tl.store(root + i_b, tl.minimum(tl.maximum(choice, 0), num_embeddings - 1))
    up = tl.load(levels_up + i_b)  # []
    slot = tl.maximum(tl.load(last_slot + i_b), 0).to(tl.int64)  # []
    o_k = tl.arange(0, BLOCK_K)
    b_row = slot * num_offsets + tl.minimum(o_k + up, num_offsets - 1)
    tl.store(rows + i_b * num_offsets + o_k, b_row, mask=o_k < num_offsets)
    tl.store(usable + i_b, tl.maximum(num_offsets - up, 0))


def launch_config(width: int, num_stops: int, num_offsets: int) -> LaunchConfig:
    """One warp: a path has a few nodes."""
    sizes = {"L": width, "T": max(num_stops, 1), "K": max(num_offsets, 1)}
    return LaunchConfig({f"BLOCK_{axis}": triton.next_power_of_2(size) for axis, size in sizes.items()}, num_warps=1)


def emit_tokens(
    path: Tensor, num_accepted: Tensor, bonus: Tensor, last_slot: Tensor, levels_up: Tensor, status: Tensor,
    tokens: Tensor, stop_tokens: Tensor, context_lens: Tensor, finished: Tensor, remaining: Tensor,
    num_offsets: int, num_embeddings: int, max_context: int,
) -> Emitted:  # fmt: skip
    """`firp_kernels.emit_tokens` on a CUDA device."""
    verified = path, num_accepted, bonus, last_slot, levels_up, status
    sizes = num_offsets, num_embeddings, max_context
    check(*verified, tokens, stop_tokens, context_lens, finished, remaining, *sizes)
    with on_device_of("path", path, emit_tokens_kernel, (torch.int32,)):
        batch, width = path.shape
        emitted = fake(*verified, tokens, stop_tokens, context_lens, finished, remaining, *sizes)
        outputs = [out.view(torch.uint8) if out.dtype == torch.bool else out for out in emitted]
        left = remaining.contiguous()
        if batch:
            emit_tokens_kernel[(batch,)](
                *(tensor.contiguous() for tensor in verified), tokens, stop_tokens.contiguous(),
                context_lens.contiguous(), finished.contiguous().view(torch.uint8), left, *outputs, *tokens.stride(),
                width, len(stop_tokens), *sizes, **launch_config(width, len(stop_tokens), num_offsets).keywords,
            )  # fmt: skip
        if left is not remaining:
            remaining.copy_(left)
    return emitted


def aot_calls() -> Iterator[tuple]:
    """Arguments of launches for `aot`."""
    for width, num_stops, num_offsets in ((4, 2, 3), (1, 1, 0), (9, 8, 8)):
        one, long = meta(1, dtype=torch.int32), meta(1, dtype=torch.int64)
        verified = meta(1, width, dtype=torch.int32), one, long, one, one, one
        tokens, stops = meta(1, 64, dtype=torch.int64), meta(num_stops, dtype=torch.int64)
        yield *verified, tokens, stops, one, meta(1, dtype=torch.bool), long, num_offsets, 32_000, 1024
