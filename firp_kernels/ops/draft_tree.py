"""`firp::draft_tree`: the next draft tree, grown best-first from marginals."""

from __future__ import annotations

import torch
from torch import Tensor

from firp_kernels import checks, registry
from firp_kernels.bitmask import num_words, pack_ancestors

SCHEMA = (
    "(Tensor probabilities, Tensor candidates, Tensor root_token, Tensor num_offsets, SymInt num_nodes, "
    "SymInt num_lookahead, Tensor? order=None) "
    "-> (Tensor tokens, Tensor parents, Tensor depths, Tensor ancestors, Tensor lookahead)"
)

TreeTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def draft_tree(
    probabilities: Tensor, candidates: Tensor, root_token: Tensor, num_offsets: Tensor, num_nodes: int,
    num_lookahead: int, order: Tensor | None = None, impl: str | None = None,
) -> TreeTensors:  # fmt: skip
    """Grow the next draft tree best-first over products of marginals.

    reach(root) = 1 and reach(child) = reach(parent) * probability of its rank at its depth, rounded to float32 at
    each product. Nodes are added by decreasing reach, N in all; ties go to the lower parent, then the lower rank.

    mass(v) = reach(v) - reach of its children, subtracted in the order they were added, in float32. Lookahead nodes are
    the root, then the nodes of largest mass, ties to the lower index. A NaN or non-positive probability is never
    drafted.

    Args:
        probabilities: [B, k, K] float32, row e holds the top-K marginal at depth e + 1, descending.
            With `order` [B, k, K, ranks]: those of the depth, ranked after each candidate of the depth above; the root
            has row 0.
        candidates: [B, k, K] int64 their tokens.
        root_token: [B] int64. num_offsets: [B] int32, usable depths; 0 leaves the root alone.
        num_nodes: N, 1..256. num_lookahead: P, 1..N.
        order: None, or [B, k, K, ranks] int32: which candidate, 0..K - 1, has a rank after its parent's candidate.

    Returns:
        tokens [B, N] int64, parents [B, N], depths [B, N], ancestors [B, N, M], lookahead [B, P], all int32.
        Nodes that could not be drafted are padding at the end; lookahead slots past the real nodes are -1.

    Raises:
        ValueError, TypeError: a shape, dtype or device that disagrees, N or P out of range; on a CPU also num_offsets
            and order.

    Source: best-first trees over marginals as in Medusa (arXiv 2401.10774) and Sequoia (2402.12374).

    Example:
        >>> import torch, firp_kernels
        >>> probabilities, candidates = torch.tensor([[[0.6, 0.3], [0.7, 0.1]]]), torch.tensor([[[10, 11], [20, 21]]])
        >>> root, usable = torch.tensor([9]), torch.tensor([2], dtype=torch.int32)
        >>> tokens, parents, *_ = firp_kernels.draft_tree(probabilities, candidates, root, usable, 4, 1)
        >>> tokens.tolist(), parents.tolist()
        ([[9, 10, 20, 11]], [[-1, 0, 1, 0]])
    """
    return registry.call(
        "draft_tree", impl, probabilities, candidates, root_token, num_offsets, num_nodes, num_lookahead, order
    )


def fake(
    probabilities: Tensor, candidates: Tensor, root_token: Tensor, num_offsets: Tensor, num_nodes: int,
    num_lookahead: int, order: Tensor | None = None,
) -> TreeTensors:  # fmt: skip
    batch = probabilities.shape[0]

    def integers(*shape: int) -> Tensor:
        return probabilities.new_empty(batch, *shape, dtype=torch.int32)

    tokens = probabilities.new_empty(batch, num_nodes, dtype=torch.int64)
    masks = integers(num_nodes, num_words(num_nodes))
    return tokens, integers(num_nodes), integers(num_nodes), masks, integers(num_lookahead)


def check(
    probabilities: Tensor, candidates: Tensor, root_token: Tensor, num_offsets: Tensor, num_nodes: int,
    num_lookahead: int, order: Tensor | None = None,
) -> None:  # fmt: skip
    checks.same_device(
        probabilities=probabilities, candidates=candidates, root_token=root_token, num_offsets=num_offsets, order=order
    )
    checks.shape("probabilities", probabilities, *[None] * (3 if order is None else 4))
    batch, k, count = probabilities.shape[:3]
    checks.some_marginals(probabilities)
    checks.shape("candidates", candidates, batch, k, count)
    if order is not None:
        checks.shape("order", order, *probabilities.shape)
        checks.dtype("order", order, torch.int32)
        checks.between("order", order, 0, count - 1)
    checks.shape("root_token", root_token, batch)
    checks.shape("num_offsets", num_offsets, batch)
    checks.dtype("probabilities", probabilities, torch.float32)
    checks.dtype("candidates", candidates, torch.int64)
    checks.dtype("root_token", root_token, torch.int64)
    checks.dtype("num_offsets", num_offsets, torch.int32)
    if not 1 <= num_nodes <= checks.MAX_NODES:
        raise ValueError(f"num_nodes: got {num_nodes}, expected 1..{checks.MAX_NODES}")
    if not 1 <= num_lookahead <= num_nodes:
        raise ValueError(f"num_lookahead: got {num_lookahead}, expected 1..{num_nodes} (num_nodes)")
    checks.between("num_offsets", num_offsets, 0, k)


def reference(
    probabilities: Tensor, candidates: Tensor, root_token: Tensor, num_offsets: Tensor, num_nodes: int,
    num_lookahead: int, order: Tensor | None = None,
) -> TreeTensors:  # fmt: skip
    check(probabilities, candidates, root_token, num_offsets, num_nodes, num_lookahead, order)
    if order is None:  # One row holds for every candidate of the depth above.
        probabilities = probabilities[:, :, None].expand(-1, -1, candidates.shape[2], -1)
        order = torch.arange(candidates.shape[2], device=candidates.device).expand(probabilities.shape)
    batch, k, count, ranks = probabilities.shape
    device = probabilities.device
    sequence = torch.arange(batch, device=device)
    # A NaN or negative entry, and everything past the last offset or rank, can never be drafted.
    table = torch.zeros(batch, k + 1, count, ranks + 1, device=device)
    usable = torch.arange(k, device=device) < num_offsets[:, None]
    table[:, :k, :, :ranks] = torch.where(usable[..., None, None] & (probabilities > 0), probabilities, 0)

    tokens = torch.zeros(batch, num_nodes, dtype=torch.long, device=device)
    parents = torch.full((batch, num_nodes), -1, dtype=torch.int32, device=device)
    depths = torch.zeros(batch, num_nodes, dtype=torch.int32, device=device)
    visible = torch.eye(num_nodes, dtype=torch.bool, device=device).repeat(batch, 1, 1)
    reach = torch.zeros(batch, num_nodes, device=device)
    next_rank = torch.zeros(batch, num_nodes, dtype=torch.long, device=device)
    held = torch.zeros(batch, num_nodes, dtype=torch.long, device=device)  # each node's candidate
    next_reach = torch.zeros(batch, num_nodes, device=device)
    mass = torch.full((batch, num_nodes), float("-inf"), device=device)
    tokens[:, 0] = root_token
    reach[:, 0] = 1.0
    mass[:, 0] = 1.0
    next_reach[:, 0] = table[:, 0, 0, 0]

    for node in range(1, num_nodes):
        best = next_reach.amax(-1)
        parent = torch.where(next_reach == best[:, None], torch.arange(num_nodes, device=device), num_nodes).amin(-1)
        real = best > 0
        depth = depths[sequence, parent].long() + 1
        rank = next_rank[sequence, parent]
        level, row = (depth - 1).clamp(max=k - 1), held[sequence, parent]
        candidate = order[sequence, level, row, rank.clamp(max=ranks - 1)].long()
        token = candidates[sequence, level, candidate]
        tokens[:, node] = torch.where(real, token, 0)
        parents[:, node] = torch.where(real, parent, -1).to(torch.int32)
        depths[:, node] = torch.where(real, depth, 0).to(torch.int32)
        visible[:, node] |= visible[sequence, parent] & real[:, None]
        reach[:, node] = best
        mass[:, node] = torch.where(real, best, float("-inf"))
        mass[sequence, parent] = torch.where(real, mass[sequence, parent] - best, mass[sequence, parent])
        next_rank[sequence, parent] += 1
        held[:, node] = torch.where(real, candidate, 0)
        sibling = reach[sequence, parent] * table[sequence, (depth - 1).clamp(max=k), row, (rank + 1).clamp(max=ranks)]
        next_reach[sequence, parent] = torch.where(real, sibling, 0)
        next_reach[:, node] = best * table[sequence, depth.clamp(max=k), held[:, node], 0]

    lookahead = torch.full((batch, num_lookahead), -1, dtype=torch.int32, device=device)
    lookahead[:, 0] = 0
    rest = mass[:, 1:].clone()
    for slot in range(1, num_lookahead):
        best = rest.amax(-1)
        node = torch.where(rest == best[:, None], torch.arange(1, num_nodes, device=device), num_nodes).amin(-1)
        real = best > float("-inf")
        lookahead[:, slot] = torch.where(real, node, -1).to(torch.int32)
        rest[sequence, (node - 1).clamp(max=num_nodes - 2)] = float("-inf")
    return tokens, parents, depths, pack_ancestors(visible), lookahead
