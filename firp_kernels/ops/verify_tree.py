"""`firp::verify_tree`: the walk over a drafted tree that accepts what the model itself would emit."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from firp_kernels import checks, registry

SCHEMA = (
    "(Tensor scores, Tensor? uniforms, Tensor tokens, Tensor parents, Tensor lookahead, SymInt max_depth) "
    "-> (Tensor path, Tensor num_accepted, Tensor bonus, Tensor last_slot, Tensor levels_up, Tensor status)"
)


class Verified(NamedTuple):
    """What a verification accepted.

    Attributes:
        path: [B, max_depth + 1] int32 accepted nodes from the root, -1 padded.
        num_accepted: [B] int32 without the root; tokens emitted = num_accepted + 1.
        bonus: [B] int64 the choice at the last accepted node, -1 where status is set.
        last_slot: [B] int32 lookahead slot of that node or of its nearest ancestor that has one, -1 if none has.
        levels_up: [B] int32 levels from the last node up to that one (max_depth + 1 if none has a slot, 0 if P is 0).
        status: [B] int32, 1 where a walked node's scores held NaN (the walk stops there), else 0.
    """

    path: Tensor
    num_accepted: Tensor
    bonus: Tensor
    last_slot: Tensor
    levels_up: Tensor
    status: Tensor


RETURNS = Verified


def verify_tree(
    scores: Tensor, uniforms: Tensor | None, tokens: Tensor, parents: Tensor, lookahead: Tensor, max_depth: int,
    impl: str | None = None,
) -> Verified:  # fmt: skip
    """Walk from the root while a child holds the token the model chooses; the first choice without child is the bonus.

    Greedy (`uniforms` is None): the choice at a node is the argmax of its scores, the first among equals.

    Sampling: `scores` are processed probabilities, which need not sum to one. The choice at depth e is drawn by inverse
    CDF: the first token whose inclusive cumulative sum (in float64) exceeds uniforms[:, e] * sum, and never a token of
    probability 0. This is lossless for any drafted tree, since the children are compared with the model's own draw.

    Among equal siblings the first wins.

    Args:
        scores: [B, N, V] logits (greedy) or probabilities (sampling).
        uniforms: [B, max_depth + 1] float32 in [0, 1), one per depth, or None.
        tokens: [B, N] int64. parents: [B, N] int32, -1 for the root and padding nodes.
        lookahead: [B, P] int32; P may be 0.
        max_depth: the deepest walk.

    Returns:
        `Verified`.

    Raises:
        ValueError, TypeError: a shape, dtype or device that disagrees; on a CPU also a malformed tree.

    Source: FIRP (arXiv 2410.20488) for the walk; draw-then-match is lossless for deterministic children.

    Example:
        >>> import torch, firp_kernels
        >>> scores = torch.eye(4)[None, [2, 3]]  # the root chooses token 2, its child token 3
        >>> tokens, parents = torch.tensor([[0, 2]]), torch.tensor([[-1, 0]], dtype=torch.int32)
        >>> verified = firp_kernels.verify_tree(scores, None, tokens, parents, parents[:, :0], 1)
        >>> verified.path.tolist(), verified.bonus.tolist()
        ([[0, 1]], [3])
    """
    return registry.call("verify_tree", impl, scores, uniforms, tokens, parents, lookahead, max_depth)


def fake(
    scores: Tensor, uniforms: Tensor | None, tokens: Tensor, parents: Tensor, lookahead: Tensor, max_depth: int
) -> Verified:
    batch = scores.shape[0]
    path = scores.new_empty(batch, max_depth + 1, dtype=torch.int32)
    num_accepted, last_slot, levels_up, status = (scores.new_empty(batch, dtype=torch.int32) for _ in range(4))
    return Verified(path, num_accepted, scores.new_empty(batch, dtype=torch.int64), last_slot, levels_up, status)


def check(
    scores: Tensor, uniforms: Tensor | None, tokens: Tensor, parents: Tensor, lookahead: Tensor, max_depth: int
) -> None:
    checks.same_device(scores=scores, uniforms=uniforms, tokens=tokens, parents=parents, lookahead=lookahead)
    checks.shape("scores", scores, None, None, None)
    batch, num_nodes, vocab = scores.shape
    if not (num_nodes and vocab):
        raise ValueError(f"scores: got shape {tuple(scores.shape)}, expected at least one node and token")
    if max_depth < 0:
        raise ValueError(f"max_depth: got {max_depth}, expected at least 0")
    if uniforms is not None:
        checks.shape("uniforms", uniforms, batch, max_depth + 1)
        checks.dtype("uniforms", uniforms, torch.float32)
    checks.shape("tokens", tokens, batch, num_nodes)
    checks.shape("parents", parents, batch, num_nodes)
    checks.shape("lookahead", lookahead, batch, None)
    checks.dtype("scores", scores, *checks.FLOATS)
    checks.dtype("tokens", tokens, torch.int64)
    checks.dtype("parents", parents, torch.int32)
    checks.dtype("lookahead", lookahead, torch.int32)
    checks.between("lookahead", lookahead, -1, num_nodes - 1)
    if checks.on_cpu(parents):
        if bool((parents[:, 0] != -1).any()):
            raise ValueError("parents: node 0 is the root, expected parent -1")
        index = torch.arange(num_nodes)
        if bool(((parents >= index) | (parents < -1)).any()):
            raise ValueError("parents: a parent must be -1 or come before its child")


def reference(
    scores: Tensor, uniforms: Tensor | None, tokens: Tensor, parents: Tensor, lookahead: Tensor, max_depth: int
) -> Verified:
    check(scores, uniforms, tokens, parents, lookahead, max_depth)
    batch, num_nodes, _ = scores.shape
    device = scores.device
    sequence = torch.arange(batch, device=device)
    node_index = torch.arange(num_nodes, device=device)
    if uniforms is None:
        greedy = scores.argmax(-1)
    else:
        cumulative = scores.double().cumsum(-1)

    def choose(node: Tensor, level: int) -> Tensor:
        if uniforms is None:
            return greedy[sequence, node]
        row, cdf = scores[sequence, node], cumulative[sequence, node]  # [B, V]
        threshold = uniforms[:, level].double() * cdf[:, -1]
        drawn = (cdf <= threshold[:, None]).sum(-1)
        last_positive = row.shape[-1] - 1 - (row > 0).flip(-1).int().argmax(-1)
        return torch.minimum(drawn, last_positive)

    def integers(value: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.full((batch,), value, dtype=dtype, device=device)

    node, walking = integers(0, torch.long), integers(1, torch.bool)
    status, num_accepted, bonus = integers(0), integers(0), integers(-1, torch.long)
    path = torch.full((batch, max_depth + 1), -1, dtype=torch.int32, device=device)
    path[:, 0] = 0
    for level in range(max_depth + 1):
        broken = walking & scores[sequence, node].isnan().any(-1)
        status = torch.where(broken, 1, status).to(torch.int32)
        walking = walking & ~broken
        choice = choose(node, level)
        bonus = torch.where(walking, choice, torch.where(broken, -1, bonus))
        if level == max_depth:
            break
        matches = (parents == node[:, None]) & (tokens == choice[:, None]) & (node_index > 0)
        walking = walking & matches.any(-1)
        node = torch.where(walking, matches.int().argmax(-1), node)
        num_accepted += walking.to(torch.int32)
        path[:, level + 1] = torch.where(walking, node, -1).to(torch.int32)

    last_slot, levels_up = integers(-1), integers(0)
    if lookahead.shape[1]:
        searching = integers(1, torch.bool)
        for _ in range(max_depth + 1):
            matches = lookahead == node[:, None]
            found = matches.any(-1) & searching
            last_slot = torch.where(found, matches.int().argmax(-1), last_slot).to(torch.int32)
            searching = searching & ~found
            levels_up += searching.to(torch.int32)
            node = torch.where(searching, parents[sequence, node].long().clamp(min=0), node)
    return Verified(path, num_accepted, bonus, last_slot, levels_up, status)
