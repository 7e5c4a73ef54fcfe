"""`firp::lookup_branch`: a branch of the next draft tree that repeats what followed an earlier occurrence."""

from __future__ import annotations

import torch
from torch import Tensor

from firp_kernels import checks, registry
from firp_kernels.bitmask import num_words

SCHEMA = (
    "(Tensor(a!) history, Tensor context_lens, Tensor emitted, Tensor counts, Tensor tokens, Tensor parents, "
    "Tensor depths, Tensor ancestors, SymInt num_branch, SymInt least_match, SymInt most_match, SymInt num_replaced=0) "
    "-> (Tensor tokens, Tensor parents, Tensor depths, Tensor ancestors)"
)

GrownTree = tuple[Tensor, Tensor, Tensor, Tensor]


def lookup_branch(
    history: Tensor, context_lens: Tensor, emitted: Tensor, counts: Tensor, tokens: Tensor, parents: Tensor,
    depths: Tensor, ancestors: Tensor, num_branch: int, least_match: int, most_match: int, num_replaced: int = 0,
    impl: str | None = None,
) -> GrownTree:  # fmt: skip
    """Note what a step emitted, find the root's tokens earlier in the text, and add to the tree what followed there.

    The text of a sequence is history[: context_lens + 1]; its last token is the root. A match of length m is an earlier
    end e with history[e - i] = history[context_lens - i] for every i < m. The longest counts, up to `most_match`
    tokens; among equals the latest. The `num_branch` tokens that follow it are walked down from the root: a token that
    a child holds already (the first of equal siblings) leads to that child, any other one becomes a new node after the
    N nodes. Where the text ends, its tokens from e + 1 on follow again, as in a loop.

    With `num_replaced` a tree keeps its size: a branch that adds any node begins R places earlier, and the last R nodes
    of the tree are gone. One that adds none leaves the tree as it is.

    Args:
        history: [B, S] int64, changed in place: the first `counts` tokens of `emitted` become the last of the text.
        context_lens: [B] int32 committed tokens after the step, at least `counts` - 1 and below S.
        emitted: [B, W] int64 as `emit_tokens` returns it. counts: [B] int64.
        tokens, parents, depths, ancestors: of the tree, [B, N], [B, N], [B, N], [B, N, M].
        num_branch: D, new nodes at most; N + D is at most 256.
        least_match: a shorter match adds nothing, 1..most_match.
        most_match: tokens that are compared at most.
        num_replaced: R, 0..D and below N. The nodes before the last R must not follow one of these.

    Returns:
        tokens, parents, depths [B, M] and ancestors [B, M, ceil(M / 32)] with M = N + D - R; places without a node are
        padding at the end.

    Raises:
        ValueError, TypeError: a shape, dtype or device that disagrees, a size out of range; on a CPU also
            context_lens, counts and parents.

    Source: prompt lookup decoding (Saxena 2023) as a branch of a draft tree.

    Example:
        >>> import torch, firp_kernels
        >>> history, lens = torch.tensor([[5, 6, 7, 8, 5, 0]]), torch.tensor([5], dtype=torch.int32)
        >>> root = torch.tensor([[6]]), lens * 0 - 1, lens * 0, torch.ones(1, 1, 1, dtype=torch.int32)
        >>> emitted = torch.tensor([[6]]), torch.tensor([1])
        >>> root = root[0], *(tensor.view(1, -1) for tensor in root[1:3]), root[3]
        >>> firp_kernels.lookup_branch(history, lens, *emitted, *root, 3, 2, 4)[0].tolist()
        [[6, 7, 8, 5]]
    """
    return registry.call(
        "lookup_branch", impl, history, context_lens, emitted, counts, tokens, parents, depths, ancestors, num_branch,
        least_match, most_match, num_replaced,
    )  # fmt: skip


def fake(
    history: Tensor, context_lens: Tensor, emitted: Tensor, counts: Tensor, tokens: Tensor, parents: Tensor,
    depths: Tensor, ancestors: Tensor, num_branch: int, least_match: int, most_match: int, num_replaced: int = 0,
) -> GrownTree:  # fmt: skip
    batch, nodes = tokens.shape[0], tokens.shape[1] + num_branch - num_replaced
    integers = (parents.new_empty(batch, nodes) for _ in range(2))
    return tokens.new_empty(batch, nodes), *integers, ancestors.new_empty(batch, nodes, num_words(nodes))


def check(
    history: Tensor, context_lens: Tensor, emitted: Tensor, counts: Tensor, tokens: Tensor, parents: Tensor,
    depths: Tensor, ancestors: Tensor, num_branch: int, least_match: int, most_match: int, num_replaced: int = 0,
) -> None:  # fmt: skip
    checks.same_device(
        history=history, context_lens=context_lens, emitted=emitted, counts=counts, tokens=tokens, parents=parents,
        depths=depths, ancestors=ancestors,
    )  # fmt: skip
    checks.shape("tokens", tokens, None, None)
    batch, nodes = tokens.shape
    if num_branch < 0 or not 1 <= nodes <= checks.MAX_NODES - num_branch:
        raise ValueError(f"num_branch: got {num_branch} for a tree of {nodes}, expected 1..{checks.MAX_NODES} together")
    if not 0 <= num_replaced <= min(num_branch, nodes - 1):
        raise ValueError(
            f"num_replaced: got {num_replaced}, expected 0..{min(num_branch, nodes - 1)} (num_branch, and not the root)"
        )
    if not 1 <= least_match <= most_match:
        raise ValueError(f"least_match: got {least_match}, expected 1..{most_match} (most_match)")
    checks.shape("history", history, batch, None)
    checks.shape("context_lens", context_lens, batch)
    checks.shape("emitted", emitted, batch, None)
    checks.shape("counts", counts, batch)
    checks.shape("parents", parents, batch, nodes)
    checks.shape("depths", depths, batch, nodes)
    checks.shape("ancestors", ancestors, batch, nodes, num_words(nodes))
    for name, tensor in (("history", history), ("emitted", emitted), ("counts", counts), ("tokens", tokens)):
        checks.dtype(name, tensor, torch.int64)
    for name, tensor in (("context_lens", context_lens), ("parents", parents), ("depths", depths)):
        checks.dtype(name, tensor, torch.int32)
    checks.dtype("ancestors", ancestors, torch.int32)
    checks.between("context_lens", context_lens, 0, history.shape[1] - 1)
    checks.between("counts", counts, 0, emitted.shape[1])
    if checks.on_cpu(counts) and bool((counts > context_lens + 1).any()):
        raise ValueError(f"counts: got {int((counts - context_lens).max())} past context_lens, expected at most 1")
    checks.between("parents", parents, -1, nodes - 1)


def reference(
    history: Tensor, context_lens: Tensor, emitted: Tensor, counts: Tensor, tokens: Tensor, parents: Tensor,
    depths: Tensor, ancestors: Tensor, num_branch: int, least_match: int, most_match: int, num_replaced: int = 0,
) -> GrownTree:  # fmt: skip
    sizes = num_branch, least_match, most_match, num_replaced
    check(history, context_lens, emitted, counts, tokens, parents, depths, ancestors, *sizes)
    batch, slots = history.shape
    count, device = tokens.shape[1], tokens.device
    kept, nodes = count - num_replaced, count + num_branch - num_replaced
    sequence, last = torch.arange(batch, device=device), context_lens.long()

    place = last[:, None] + 1 - counts[:, None] + torch.arange(emitted.shape[1], device=device)
    new = torch.arange(emitted.shape[1], device=device) < counts[:, None]
    # A token that was not emitted writes what is there, over the root's own place.
    place = torch.where(new, place, last[:, None])
    rooted = emitted.gather(1, (counts - 1).clamp(min=0)[:, None])[:, 0]
    rooted = torch.where(counts > 0, rooted, history[sequence, last])
    history.scatter_(1, place, torch.where(new, emitted, rooted[:, None]))

    ends = torch.arange(slots, device=device)
    length = torch.zeros(batch, slots, dtype=torch.long, device=device)
    for i in range(min(most_match, slots)):
        same = (
            (history.roll(i, 1) == history[sequence, (last - i).clamp(min=0)][:, None])
            & (ends >= i)
            & (last[:, None] >= i)
        )
        length += (same & (length == i)).long()
    length = torch.where(ends < last[:, None], length, 0)
    end = (length * slots + ends).argmax(1)  # the longest, then the latest
    found = length[sequence, end] >= least_match

    def grown(tensor: Tensor, value: int) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, nodes - count), value=value)

    tokens, parents, depths = grown(tokens, 0), grown(parents, -1), grown(depths, 0)
    own = torch.zeros(batch, nodes, num_words(nodes), dtype=torch.int32, device=device)
    own[:, :count, : ancestors.shape[2]] = ancestors
    index = torch.arange(nodes, device=device)
    bit = torch.where(index % 32 == 31, -(2**31), 1 << (index % 32)).to(torch.int32)
    own[:, index[count:], index[count:] // 32] = bit[count:]
    alone = torch.zeros(nodes, own.shape[2], dtype=torch.int32, device=device)
    alone[index, index // 32] = bit

    node, used = torch.zeros_like(last), torch.full_like(last, kept)
    for depth in range(num_branch):
        token = history[sequence, (end + 1 + depth % (last - end).clamp(min=1)).clamp(max=slots - 1)]
        children = (parents == node[:, None]) & (tokens == token[:, None]) & (index < used[:, None]) & (index > 0)
        held = children.any(1)
        child = torch.where(held, children.int().argmax(1), used)
        adds = found & ~held
        to = child.clamp(max=nodes - 1)
        tokens[sequence, to] = torch.where(adds, token, tokens[sequence, to])
        parents[sequence, to] = torch.where(adds, node.to(torch.int32), parents[sequence, to])
        depths[sequence, to] = torch.where(adds, depths[sequence, node] + 1, depths[sequence, to])
        own[sequence, to] = torch.where(adds[:, None], own[sequence, node] | alone[to], own[sequence, to])
        used = used + adds.long()
        node = torch.where(found, to, node)
    gone = (index >= used[:, None]) & (used > kept)[:, None]
    tokens, depths = (part.masked_fill(gone, 0) for part in (tokens, depths))
    return tokens, parents.masked_fill(gone, -1), depths, torch.where(gone[..., None], alone, own)
