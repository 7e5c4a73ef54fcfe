"""The torch oracle of every op, written to be read; also the CPU path where the C++ extension is not built.

Contracts, shapes and errors are in `ops.py`. Arithmetic is in float32, or float64 for float64 inputs. The oracles of
`row_ops.py` are written in `row_reference.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from firp_kernels import checks
from firp_kernels.row_reference import (  # noqa: F401
    computed_in,
    condition_marginals,
    gated_linear,
    joint_linear,
    linear,
    rms_norm,
    rotary,
    top_marginals,
)

WORD_BITS = 32


def unpack_ancestors(ancestors: Tensor, num_nodes: int) -> Tensor:
    """Bitmask words [B, N, M] to bool [B, N, N]; entry [b, i, a]: node a is i or an ancestor of i."""
    bits = torch.arange(WORD_BITS, device=ancestors.device, dtype=torch.int32)
    flat = ((ancestors[..., None] >> bits) & 1).flatten(-2)
    return flat[..., :num_nodes].bool()


def pack_ancestors(visible: Tensor) -> Tensor:
    """Bool [B, N, N] to bitmask words [B, N, ceil(N/32)] int32."""
    num_nodes = visible.shape[-1]
    words = (num_nodes + WORD_BITS - 1) // WORD_BITS
    padded = torch.nn.functional.pad(visible.long(), (0, words * WORD_BITS - num_nodes))
    weights = 1 << torch.arange(WORD_BITS, device=visible.device, dtype=torch.int64)
    unsigned = (padded.unflatten(-1, (words, WORD_BITS)) * weights).sum(-1)
    return torch.where(unsigned >= 2**31, unsigned - 2**32, unsigned).to(torch.int32)


def write_cache(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, context_lens: Tensor) -> None:
    checks.write_cache(key, value, key_cache, value_cache, context_lens)
    batch, rows = key.shape[:2]
    sequence = torch.arange(batch, device=key.device)[:, None]
    slots = context_lens.long()[:, None] + torch.arange(rows, device=key.device)
    key_cache[sequence, slots] = key
    value_cache[sequence, slots] = value


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
) -> Tensor:
    checks.tree_attention(
        query, key_cache, value_cache, context_lens, depths, ancestors, lookahead, num_offsets, sliding_window
    )
    batch, rows, heads, width = query.shape
    kv_heads, num_nodes = key_cache.shape[2], depths.shape[1]
    wide = computed_in(query.dtype)
    shared = int(context_lens.max()) + num_nodes
    slots = torch.arange(shared, device=query.device)
    context = context_lens.long()[:, None]
    node_of_slot = slots - context
    live = node_of_slot < num_nodes

    row_nodes = torch.arange(num_nodes, device=query.device).expand(batch, -1)
    row_offsets = torch.zeros_like(row_nodes)
    if rows > num_nodes:
        row_nodes = torch.cat([row_nodes, lookahead.long().repeat_interleave(num_offsets, 1)], 1)
        offsets = torch.arange(1, num_offsets + 1, device=query.device).repeat(lookahead.shape[1])
        row_offsets = torch.cat([row_offsets, offsets.expand(batch, -1)], 1)
    empty = row_nodes < 0
    row_nodes = row_nodes.clamp(min=0)
    row_depths = depths.long().gather(1, row_nodes).masked_fill(empty, 0)
    row_positions = context + row_depths + row_offsets

    node_visible = unpack_ancestors(ancestors, num_nodes)
    row_visible = node_visible.gather(1, row_nodes[..., None].expand(-1, -1, num_nodes)) & ~empty[..., None]
    tail = row_visible.gather(2, node_of_slot.clamp(0, num_nodes - 1)[:, None].expand(-1, rows, -1))
    visible = torch.where((node_of_slot < 0)[:, None], True, tail & live[:, None])
    slot_depths = depths.long().gather(1, node_of_slot.clamp(0, num_nodes - 1))
    slot_positions = torch.where(node_of_slot < 0, slots, context + slot_depths)
    if sliding_window is not None:
        visible &= slot_positions[:, None] > row_positions[..., None] - sliding_window

    key = key_cache[:, :shared].to(wide).permute(0, 2, 3, 1)
    value = value_cache[:, :shared].to(wide).masked_fill(~live[..., None, None], 0).transpose(1, 2)
    grouped = query.to(wide).unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)
    group = heads // kv_heads
    scores = (grouped.flatten(2, 3) @ key).unflatten(2, (group, rows)) * scale
    scores = scores.masked_fill(~visible[:, None, None], float("-inf"))

    def weighted(part_scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        peak = part_scores.amax(-1, keepdim=True).clamp(min=torch.finfo(wide).min)
        weights = (part_scores - peak).exp()
        total = weights.sum(-1, keepdim=True)
        return peak, total, (weights.flatten(2, 3) @ value).unflatten(2, weights.shape[2:4])

    _, total, node_out = weighted(scores[..., :num_nodes, :])
    out = [node_out / total]
    if rows > num_nodes:
        out.append(_pseudo_rows(grouped, key_cache, value_cache, context_lens, scores, weighted, num_nodes, num_offsets, scale, sliding_window))
    return torch.cat(out, 3).permute(0, 3, 1, 2, 4).reshape(batch, rows, heads, width).to(query.dtype).contiguous()


def _pseudo_rows(
    grouped, key_cache, value_cache, context_lens, scores, weighted, num_nodes, num_offsets, scale, sliding_window
) -> Tensor:
    """Pseudo rows: context and nodes, already scored, joined with each row's own chain of pseudo rows."""
    batch, _kv_heads, _group, rows, _width = grouped.shape
    wide, k = grouped.dtype, num_offsets
    count = rows - num_nodes
    sequence = torch.arange(batch, device=grouped.device)[:, None]
    slots = context_lens.long()[:, None] + num_nodes + torch.arange(count, device=grouped.device)
    key = key_cache[sequence, slots].to(wide).unflatten(1, (-1, k)).permute(0, 3, 1, 2, 4)
    value = value_cache[sequence, slots].to(wide).unflatten(1, (-1, k)).permute(0, 3, 1, 2, 4)
    query = grouped[..., num_nodes:, :].unflatten(3, (-1, k))
    chain = torch.einsum("bhgpid,bhpjd->bhgpij", query, key) * scale
    offset = torch.arange(k, device=grouped.device)
    seen = offset[:, None] >= offset
    if sliding_window is not None:
        seen = seen & (offset > offset[:, None] - sliding_window)
    chain = chain.masked_fill(~seen, float("-inf"))
    peak, total, base = weighted(scores[..., num_nodes:, :])
    peak, total, base = (part.unflatten(3, (-1, k)) for part in (peak, total, base))
    joint = torch.maximum(peak, chain.amax(-1, keepdim=True))
    weights = (chain - joint).exp()
    own = torch.where(seen[..., None], value[:, :, None, :, None], 0)
    numerator = base * (peak - joint).exp() + (weights[..., None] * own).sum(-2)
    denominator = total * (peak - joint).exp() + weights.sum(-1, keepdim=True)
    return (numerator / denominator).flatten(3, 4)


def predictor_projection(hidden: Tensor, weight: Tensor, lookahead: Tensor) -> Tensor:
    checks.predictor_projection(hidden, weight, lookahead)
    index = lookahead.long().clamp(min=0)[..., None].expand(-1, -1, hidden.shape[-1])
    source = hidden.gather(1, index)
    pseudo = torch.einsum("kod,bpd->bpko", weight, source)
    pseudo = pseudo.masked_fill((lookahead < 0)[..., None, None], 0)
    return torch.cat([hidden, pseudo.flatten(1, 2)], dim=1)


def verify_tree(
    scores: Tensor, uniforms: Tensor | None, tokens: Tensor, parents: Tensor, lookahead: Tensor, max_depth: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    checks.verify_tree(scores, uniforms, tokens, parents, lookahead, max_depth)
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
        row, cdf = scores[sequence, node], cumulative[sequence, node]
        threshold = uniforms[:, level].double() * cdf[:, -1]
        drawn = (cdf <= threshold[:, None]).sum(-1)
        last_positive = row.shape[-1] - 1 - (row > 0).flip(-1).int().argmax(-1)
        return torch.minimum(drawn, last_positive)

    node = torch.zeros(batch, dtype=torch.long, device=device)
    walking = torch.ones(batch, dtype=torch.bool, device=device)
    status = torch.zeros(batch, dtype=torch.int32, device=device)
    num_accepted = torch.zeros(batch, dtype=torch.int32, device=device)
    bonus = torch.full((batch,), -1, dtype=torch.long, device=device)
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

    last_slot = torch.full((batch,), -1, dtype=torch.int32, device=device)
    shift = torch.zeros(batch, dtype=torch.int32, device=device)
    if lookahead.shape[1]:
        ancestor, searching = node.clone(), torch.ones_like(walking)
        for _ in range(max_depth + 1):
            matches = lookahead == ancestor[:, None]
            found = matches.any(-1) & searching
            last_slot = torch.where(found, matches.int().argmax(-1), last_slot).to(torch.int32)
            searching = searching & ~found
            shift += searching.to(torch.int32)
            ancestor = torch.where(searching, parents[sequence, ancestor].long().clamp(min=0), ancestor)
    return path, num_accepted, bonus, node.to(torch.int32), last_slot, shift, status


def commit_cache(cache: Tensor, context_lens: Tensor, path: Tensor, num_accepted: Tensor, finished: Tensor) -> None:
    checks.commit_cache(cache, context_lens, path, num_accepted, finished)
    for b in range(cache.shape[2]):
        if finished[b]:
            continue
        start, count = int(context_lens[b]), int(num_accepted[b]) + 1
        source = start + path[b, :count].long()
        cache[:, :, b, start : start + count] = cache[:, :, b, source]
        context_lens[b] += count


def draft_tree(
    probabilities: Tensor,
    candidates: Tensor,
    root_token: Tensor,
    num_offsets: Tensor,
    num_nodes: int,
    num_lookahead: int,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    checks.draft_tree(probabilities, candidates, root_token, num_offsets, num_nodes, num_lookahead, order)
    if order is None:  # One row serves every candidate of the depth above.
        probabilities = probabilities[:, :, None].expand(-1, -1, candidates.shape[2], -1)
        order = torch.arange(candidates.shape[2], device=candidates.device).expand(probabilities.shape)
    batch, k, width, ranks = probabilities.shape
    device = probabilities.device
    sequence = torch.arange(batch, device=device)
    # A NaN or negative entry, and everything past the last offset or rank, can never be drafted.
    table = torch.zeros(batch, k + 1, width, ranks + 1, device=device)
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
        best, parent = next_reach.max(-1)
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
