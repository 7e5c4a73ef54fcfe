"""Every op of the package: schema, shape rule (fake), contract.

Letters: B sequences, N tree nodes (root included), P lookahead nodes, k offsets, R rows (N, or N + P*k),
H query heads, Hkv key/value heads, D head width, S cache slots, V vocabulary, M = ceil(N / 32) mask words,
d model width, L layers. Integers are int32, token ids int64.

Rows: node rows come first; the pseudo row of lookahead slot p and offset j (1..k) is row N + p*k + (j - 1). A row's
position is context_lens + depth of its node (+ j). Node 0 is the root; a parent's index is smaller than its child's.
Padding nodes hold token 0, parent -1 and only their own ancestor bit; empty lookahead slots hold -1. Outputs of
padding rows are finite and ignored, as long as their inputs are finite.

What a layer of the model does with few rows of its own (linear and its like) stands in `row_ops.py`.

Each op is `firp::NAME`. Calling the function here goes through torch's dispatcher to the one owner for the device;
`impl="reference"`, "triton" or "extension" asks for an implementation by name and never falls back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace

import torch
from torch import Tensor

from firp_kernels import registry, row_ops

TreeTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
VerifiedPath = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _fake_nothing(*_) -> None:
    return None


def _fake_tree_attention(query, *_) -> Tensor:
    return query.new_empty(query.shape)


def _fake_predictor_projection(hidden, weight, lookahead) -> Tensor:
    batch, nodes, width = hidden.shape
    return hidden.new_empty(batch, nodes + lookahead.shape[1] * weight.shape[0], width)


def _fake_verify_tree(scores, uniforms, tokens, parents, lookahead, max_depth) -> VerifiedPath:
    batch = scores.shape[0]
    path = scores.new_empty(batch, max_depth + 1, dtype=torch.int32)
    num_accepted, last_node, last_slot, shift, status = (scores.new_empty(batch, dtype=torch.int32) for _ in range(5))
    return path, num_accepted, scores.new_empty(batch, dtype=torch.int64), last_node, last_slot, shift, status


def _fake_draft_tree(
    probabilities, candidates, root_token, num_offsets, num_nodes, num_lookahead, order=None
) -> TreeTensors:
    batch = probabilities.shape[0]

    def integers(*shape: int) -> Tensor:
        return probabilities.new_empty(batch, *shape, dtype=torch.int32)

    tokens = probabilities.new_empty(batch, num_nodes, dtype=torch.int64)
    words = (num_nodes + 31) // 32
    return tokens, integers(num_nodes), integers(num_nodes), integers(num_nodes, words), integers(num_lookahead)


SCHEMAS: dict[str, tuple[str, Callable]] = {
    "write_cache": (
        "(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor context_lens) -> ()",
        _fake_nothing,
    ),
    "tree_attention": (
        "(Tensor query, Tensor key_cache, Tensor value_cache, Tensor context_lens, Tensor depths, Tensor ancestors, "
        "Tensor lookahead, int num_offsets, float scale, int? sliding_window=None) -> Tensor",
        _fake_tree_attention,
    ),
    "predictor_projection": (
        "(Tensor hidden, Tensor weight, Tensor lookahead) -> Tensor",
        _fake_predictor_projection,
    ),
    "verify_tree": (
        "(Tensor scores, Tensor? uniforms, Tensor tokens, Tensor parents, Tensor lookahead, SymInt max_depth) "
        "-> (Tensor path, Tensor num_accepted, Tensor bonus, Tensor last_node, Tensor last_slot, Tensor shift, "
        "Tensor status)",
        _fake_verify_tree,
    ),
    "commit_cache": (
        "(Tensor(a!) cache, Tensor(b!) context_lens, Tensor path, Tensor num_accepted, Tensor finished) -> ()",
        _fake_nothing,
    ),
    "draft_tree": (
        "(Tensor probabilities, Tensor candidates, Tensor root_token, Tensor num_offsets, SymInt num_nodes, "
        "SymInt num_lookahead, Tensor? order=None) -> (Tensor tokens, Tensor parents, Tensor depths, Tensor ancestors, Tensor lookahead)",
        _fake_draft_tree,
    ),
} | row_ops.SCHEMAS

registry.define(SCHEMAS)


def write_cache(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, context_lens: Tensor, impl: str | None = None
) -> None:
    """Write a step's keys and values behind the context of one layer's cache, in place.

    Args:
        key, value: [B, R, Hkv, D] rows of this step (any strides), key after rotary.
        key_cache, value_cache: [B, S, Hkv, D]; row r goes to slot context_lens + r.
        context_lens: [B] int32 committed tokens.

    Raises:
        ValueError, TypeError: a shape, dtype or device that disagrees; on a CPU also a length past the capacity.
    """
    registry.call("write_cache", impl, key, value, key_cache, value_cache, context_lens)


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
    impl: str | None = None,
) -> Tensor:
    """Attention of tree rows over the committed context and the tree, the mask implied, never materialised.

    Every row sees the whole context. A node row sees itself and its ancestors. A pseudo row (p, j) sees what the node
    of slot p sees, and pseudo rows (p, j' <= j). An empty slot's rows see the context and their own chain. Keys and
    values of this step are in the cache already (`write_cache`). What slots past the step's rows, or rows that a row
    does not see, hold (NaN too) never changes that row's output; node rows are bit-identical whatever pseudo rows hold.

    Args:
        query: [B, R, H, D] after rotary, float16, bfloat16, float32 (float64: reference only); any strides.
        key_cache, value_cache: [B, S, Hkv, D], one layer; H a multiple of Hkv; S >= context_lens + R.
        context_lens: [B] int32, 0 allowed.
        depths: [B, N] int32, 1 <= N <= 256.
        ancestors: [B, N, M] int32 bitmasks; bit i % 32 of word i // 32: node i is visible; own bit included.
        lookahead: [B, P] int32 node of each slot, -1 empty. Ignored when R == N.
        num_offsets: k.
        scale: factor of the scores.
        sliding_window: a row at position p sees positions > p - sliding_window; None for no limit. By position,
            not by slot.

    Returns:
        [B, R, H, D] contiguous, dtype of query; accumulated in float32.

    Raises:
        ValueError, TypeError: a shape, dtype or device that disagrees; on a CPU also lengths past the capacity and
        lookahead nodes out of range.

    Source: tree attention of SpecInfer (arXiv 2305.09781) and Medusa (2401.10774); pseudo rows of FIRP (2410.20488).
    """
    return registry.call(
        "tree_attention", impl, query, key_cache, value_cache, context_lens, depths, ancestors, lookahead,
        num_offsets, scale, sliding_window,
    )  # fmt: skip


def predictor_projection(hidden: Tensor, weight: Tensor, lookahead: Tensor, impl: str | None = None) -> Tensor:
    """Append the pseudo rows of the lookahead nodes: pseudo[p, j] = weight[j] @ hidden[lookahead[p]].

    Args:
        hidden: [B, N, d] node rows at the insertion layer.
        weight: [k, d, d], output dimension first, dtype of hidden.
        lookahead: [B, P] int32; the rows of an empty slot (-1) are zero.

    Returns:
        [B, N + P*k, d]: the node rows unchanged, then the pseudo rows slot by slot.

    Raises:
        ValueError, TypeError: a shape, dtype or device that disagrees; on a CPU also a node out of range.

    Source: FIRP (arXiv 2410.20488), section 3.
    """
    return registry.call("predictor_projection", impl, hidden, weight, lookahead)


def verify_tree(
    scores: Tensor,
    uniforms: Tensor | None,
    tokens: Tensor,
    parents: Tensor,
    lookahead: Tensor,
    max_depth: int,
    impl: str | None = None,
) -> VerifiedPath:
    """Walk from the root while a child holds the token the model chooses; the first choice without child is the bonus.

    Greedy (`uniforms` is None): the choice at a node is the argmax of its scores, the first among equals. Sampling:
    `scores` are processed probabilities (need not sum to one) and the choice at depth e is drawn by inverse CDF, the
    first token whose inclusive cumulative sum (accumulated in float64 by the reference) exceeds
    uniforms[:, e] * sum; never a token of probability 0. Lossless for any drafted tree: the children are tested
    against the model's own draw. Among equal siblings the first wins.

    Args:
        scores: [B, N, V] logits (greedy) or probabilities (sampling, float32).
        uniforms: [B, max_depth + 1] float32 in [0, 1), one per depth, or None.
        tokens: [B, N] int64. parents: [B, N] int32, -1 for the root and padding nodes.
        lookahead: [B, P] int32; P may be 0.
        max_depth: the deepest walk.

    Returns:
        path: [B, max_depth + 1] int32 accepted nodes from the root, -1 padded.
        num_accepted: [B] int32 without the root; tokens emitted = num_accepted + 1.
        bonus: [B] int64 the choice at the last accepted node, -1 where status is set.
        last_node: [B] int32 the last accepted node.
        last_slot: [B] int32 lookahead slot of that node or of its nearest ancestor that has one, -1 if none has.
        shift: [B] int32 levels between that node and the last one (max_depth + 1 if none has one).
        status: [B] int32, 1 where a walked node's scores held NaN (the walk stops there), else 0.

    Raises:
        ValueError, TypeError: a shape, dtype or device that disagrees; on a CPU also a malformed tree.

    Source: FIRP (arXiv 2410.20488) for the walk; draw-then-match is lossless for deterministic children.
    """
    return registry.call("verify_tree", impl, scores, uniforms, tokens, parents, lookahead, max_depth)


def commit_cache(
    cache: Tensor,
    context_lens: Tensor,
    path: Tensor,
    num_accepted: Tensor,
    finished: Tensor,
    impl: str | None = None,
) -> None:
    """Move keys and values of the accepted path to the end of the context, in every layer, in place.

    Slot context_lens + i takes what slot context_lens + path[i] held, for i = 0..num_accepted; context_lens then grows
    by num_accepted + 1. path ascends and path[i] >= i, so moving in ascending order is safe. Finished sequences stay
    as they are.

    Args:
        cache: [L, 2, B, S, Hkv, D], keys then values. context_lens: [B] int32.
        path: [B, max_depth + 1] int32, num_accepted: [B] int32, as `verify_tree` returns them. finished: [B] bool.

    Raises:
        ValueError, TypeError: a shape, dtype or device that disagrees; on a CPU also a path that does not ascend
        from 0 or leaves the cache.
    """
    registry.call("commit_cache", impl, cache, context_lens, path, num_accepted, finished)


def draft_tree(
    probabilities: Tensor,
    candidates: Tensor,
    root_token: Tensor,
    num_offsets: Tensor,
    num_nodes: int,
    num_lookahead: int,
    order: Tensor | None = None,
    impl: str | None = None,
) -> TreeTensors:
    """Grow the next draft tree best-first over products of marginals.

    reach(root) = 1 and reach(child) = reach(parent) * probability of its rank at its depth, rounded to float32 at
    each product. Nodes are added by decreasing reach, N in all; ties go to the lower parent, then the lower rank.
    mass(v) = reach(v) - reach of its children, subtracted in the order they were added, in float32. Lookahead: the root,
    then the nodes of largest mass, ties to the lower index. A NaN or non-positive probability is never drafted.

    Args:
        probabilities: [B, k, K] float32, row e holds the top-K marginal at depth e + 1, descending.
            With `order` [B, k, K, R]: R ranked candidates for each candidate of the depth above; the root has row 0.
        candidates: [B, k, K] int64 their tokens.
        root_token: [B] int64. num_offsets: [B] int32, usable depths; 0 leaves the root alone.
        num_nodes: N, 1..256. num_lookahead: P, 1..N.
        order: None, or [B, k, K, R] int32: which candidate, 0..K - 1, has a rank behind its parent's candidate.

    Returns:
        tokens [B, N] int64, parents [B, N], depths [B, N], ancestors [B, N, M], lookahead [B, P], all int32.
        Nodes that could not be drafted are padding at the end; lookahead slots past the real nodes are -1.

    Raises:
        ValueError, TypeError: a shape, dtype or device that disagrees, N or P out of range; on a CPU also num_offsets
            and order.

    Source: best-first trees over marginals as in Medusa (arXiv 2401.10774) and Sequoia (2402.12374).
    """
    return registry.call(
        "draft_tree", impl, probabilities, candidates, root_token, num_offsets, num_nodes, num_lookahead, order
    )


def bind(impl: str | Mapping[str, str] | None) -> SimpleNamespace:
    """All ops as attributes of one object, each asked of its implementation.

    Args:
        impl: one for every op, or one for each op named in a mapping (`{"tree_attention": "triton"}`); None, and an op
            that is not named, takes the owner for the tensors' device.

    Raises:
        ValueError: an unknown op or implementation, or an op that has no such implementation.
    """
    chosen = impl if isinstance(impl, Mapping) else dict.fromkeys(SCHEMAS, impl)
    if unknown := sorted(chosen.keys() - SCHEMAS.keys()):
        raise ValueError(f"impl: got op {unknown[0]!r}, expected one of {', '.join(SCHEMAS)}")
    return SimpleNamespace(**{name: registry.bound(name, chosen.get(name)) for name in SCHEMAS})
