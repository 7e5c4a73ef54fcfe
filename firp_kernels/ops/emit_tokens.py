"""`firp::emit_tokens`: from a verified path to the tokens a step emits, and what commit and draft need of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from firp_kernels import checks, registry

SCHEMA = (
    "(Tensor path, Tensor num_accepted, Tensor bonus, Tensor last_slot, Tensor levels_up, Tensor status, "
    "Tensor tokens, Tensor stop_tokens, Tensor context_lens, Tensor finished, Tensor(a!) remaining, "
    "SymInt num_offsets, SymInt num_embeddings, SymInt max_context) "
    "-> (Tensor emitted, Tensor counts, Tensor kept, Tensor ended, Tensor root, Tensor rows, Tensor usable, "
    "Tensor packed)"
)


class Emitted(NamedTuple):
    """What a step emits, and what its commit and its draft take.

    Attributes:
        tokens: [B, max_depth + 1] int64; the first `counts` of each row are new, the rest is -1.
        counts: [B] int64, 0 for a sequence that was finished or whose status is set.
        kept: [B] int32 nodes to commit after the root: max(counts - 1, 0).
        finished: [B] bool, after the step.
        root: [B] int64 token of the next tree's root.
        rows: [B, k] int64, the pseudo row for each depth of the next tree, counted from the first pseudo row.
        usable: [B] int32, for how many depths these rows hold scores.
        packed: [B, max_depth + 4] int64 tokens, counts, finished and status, for one copy to the host.
    """

    tokens: Tensor
    counts: Tensor
    kept: Tensor
    finished: Tensor
    root: Tensor
    rows: Tensor
    usable: Tensor
    packed: Tensor


RETURNS = Emitted


def emit_tokens(
    path: Tensor, num_accepted: Tensor, bonus: Tensor, last_slot: Tensor, levels_up: Tensor, status: Tensor,
    tokens: Tensor, stop_tokens: Tensor, context_lens: Tensor, finished: Tensor, remaining: Tensor,
    num_offsets: int, num_embeddings: int, max_context: int, impl: str | None = None,
) -> Emitted:  # fmt: skip
    """Tokens of the accepted nodes and the bonus token, cut after the first stop token and at the limit.

    A sequence finishes with a stop token, at its limit, where status is set, or where its context after the commit
    (context_lens + kept + 1) is longer than `max_context`. One that was finished emits nothing.

    Where the lookahead slot is m levels above the last node, its offsets m + 1 .. k are for depths 1 .. k - m.

    Args:
        path, num_accepted, bonus, last_slot, levels_up, status: as `verify_tree` returns them.
        tokens: [B, N] int64 of the tree.
        stop_tokens: [n] int64, -1 for none.
        context_lens: [B] int32 before the commit. finished: [B] bool before the step.
        remaining: [B] int64 tokens that may still be emitted, reduced in place by `counts`.
        num_offsets: k, 0 where nothing is drafted.
        num_embeddings: tokens of the model; the root is below it.
        max_context: the longest context that leaves room for another step.

    Returns:
        `Emitted`.

    Raises:
        ValueError, TypeError: a shape, dtype or device that disagrees; on a CPU also a path out of range.

    Example:
        >>> import torch, firp_kernels
        >>> path, one = torch.tensor([[0, 2, -1]], dtype=torch.int32), torch.tensor([1], dtype=torch.int32)
        >>> verified = firp_kernels.Verified(path, one, torch.tensor([9]), one - 1, one - 1, one - 1)
        >>> state = torch.tensor([5]), one * 10, torch.tensor([False]), torch.tensor([8])
        >>> emitted = firp_kernels.emit_tokens(*verified, torch.tensor([[3, 4, 7]]), *state, 2, 100, 50)
        >>> emitted.tokens.tolist(), emitted.kept.tolist(), emitted.finished.tolist()
        ([[7, 9, -1]], [1], [False])
    """
    return registry.call(
        "emit_tokens", impl, path, num_accepted, bonus, last_slot, levels_up, status, tokens, stop_tokens, context_lens,
        finished, remaining, num_offsets, num_embeddings, max_context,
    )  # fmt: skip


def fake(
    path: Tensor, num_accepted: Tensor, bonus: Tensor, last_slot: Tensor, levels_up: Tensor, status: Tensor,
    tokens: Tensor, stop_tokens: Tensor, context_lens: Tensor, finished: Tensor, remaining: Tensor,
    num_offsets: int, num_embeddings: int, max_context: int,
) -> Emitted:  # fmt: skip
    batch, width = path.shape

    def new(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return path.new_empty(batch, *shape, dtype=dtype)

    return Emitted(
        new(width), new(), new(dtype=torch.int32), new(dtype=torch.bool), new(), new(num_offsets),
        new(dtype=torch.int32), new(width + 3),
    )  # fmt: skip


def check(
    path: Tensor, num_accepted: Tensor, bonus: Tensor, last_slot: Tensor, levels_up: Tensor, status: Tensor,
    tokens: Tensor, stop_tokens: Tensor, context_lens: Tensor, finished: Tensor, remaining: Tensor,
    num_offsets: int, num_embeddings: int, max_context: int,
) -> None:  # fmt: skip
    checks.same_device(
        path=path, num_accepted=num_accepted, bonus=bonus, last_slot=last_slot, levels_up=levels_up, status=status,
        tokens=tokens, stop_tokens=stop_tokens, context_lens=context_lens, finished=finished, remaining=remaining,
    )  # fmt: skip
    checks.shape("path", path, None, None)
    batch, width = path.shape
    if not width:
        raise ValueError(f"path: got shape {tuple(path.shape)}, expected at least the root")
    integers = {"num_accepted": num_accepted, "last_slot": last_slot, "levels_up": levels_up, "status": status}
    integers |= {"context_lens": context_lens}
    for name, tensor in (*integers.items(), ("bonus", bonus), ("finished", finished), ("remaining", remaining)):
        checks.shape(name, tensor, batch)
    checks.shape("tokens", tokens, batch, None)
    checks.shape("stop_tokens", stop_tokens, None)
    for name, tensor in (("path", path), *integers.items()):
        checks.dtype(name, tensor, torch.int32)
    for name, tensor in (("bonus", bonus), ("tokens", tokens), ("stop_tokens", stop_tokens), ("remaining", remaining)):
        checks.dtype(name, tensor, torch.int64)
    checks.dtype("finished", finished, torch.bool)
    checks.between("path", path, -1, tokens.shape[1] - 1)
    checks.between("num_accepted", num_accepted, 0, width - 1)
    if num_offsets < 0:
        raise ValueError(f"num_offsets: got {num_offsets}, expected at least 0")
    if num_embeddings < 1:
        raise ValueError(f"num_embeddings: got {num_embeddings}, expected at least 1")


def reference(
    path: Tensor, num_accepted: Tensor, bonus: Tensor, last_slot: Tensor, levels_up: Tensor, status: Tensor,
    tokens: Tensor, stop_tokens: Tensor, context_lens: Tensor, finished: Tensor, remaining: Tensor,
    num_offsets: int, num_embeddings: int, max_context: int,
) -> Emitted:  # fmt: skip
    check(
        path, num_accepted, bonus, last_slot, levels_up, status, tokens, stop_tokens, context_lens, finished, remaining,
        num_offsets, num_embeddings, max_context,
    )  # fmt: skip
    index = torch.arange(path.shape[1], device=path.device)
    accepted = tokens.gather(1, path[:, 1:].long().clamp(min=0))
    emitted = torch.cat([accepted, bonus[:, None]], 1)
    emitted = torch.where(index == num_accepted[:, None], bonus[:, None], emitted)
    broken = status != 0
    counts = torch.minimum(num_accepted.long() + 1, remaining).masked_fill(finished | broken, 0)
    stops = (emitted[..., None] == stop_tokens).any(-1) & (index < counts[:, None])
    stopped = stops.any(1)
    counts = torch.where(stopped, stops.int().argmax(1) + 1, counts)
    remaining.sub_(counts)
    emitted = emitted.masked_fill(index >= counts[:, None], -1)
    kept = (counts - 1).clamp(min=0).to(torch.int32)
    full = context_lens + kept + 1 > max_context
    after = finished | stopped | (remaining == 0) | broken | full

    offset = (torch.arange(num_offsets, device=path.device) + levels_up[:, None]).clamp(max=num_offsets - 1)
    rows = last_slot.long().clamp(min=0)[:, None] * num_offsets + offset
    usable = (num_offsets - levels_up).clamp(min=0).to(torch.int32)
    packed = torch.cat([emitted, torch.stack([counts, after.long(), status.long()], 1)], 1)
    root = bonus.clamp(min=0, max=num_embeddings - 1)
    return Emitted(emitted, counts, kept, after, root, rows, usable, packed)
