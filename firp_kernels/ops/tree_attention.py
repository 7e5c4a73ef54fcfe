"""`firp::tree_attention`: attention of tree rows over the committed context and the tree."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from firp_kernels import checks, registry
from firp_kernels.bitmask import num_words, unpack_ancestors

SCHEMA = (
    "(Tensor query, Tensor key_cache, Tensor value_cache, Tensor context_lens, Tensor depths, Tensor ancestors, "
    "Tensor lookahead, int num_offsets, float scale, int? sliding_window=None) -> Tensor"
)


def tree_attention(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, context_lens: Tensor, depths: Tensor, ancestors: Tensor,
    lookahead: Tensor, num_offsets: int, scale: float, sliding_window: int | None = None, impl: str | None = None,
) -> Tensor:  # fmt: skip
    """Attention of tree rows over the committed context and the tree, the mask implied and never materialised.

    Every row sees the whole context. A node row also sees itself and its ancestors. A pseudo row (p, j) sees what the
    node of slot p sees, and pseudo rows (p, j' <= j). The rows of an empty slot see the context and their own chain.
    `tree_mask` states this as a dense mask. Keys and values of this step are in the cache already (`write_cache`).

    What a row does not see never changes that row's output, even if it is NaN. This holds for slots past the step's
    rows, and for other rows of the step. Node rows have the same bits for any pseudo rows.

    Args:
        query: [B, R, H, D] after rotary, float16, bfloat16, float32 (float64: not Triton); any strides.
        key_cache, value_cache: [B, S, Hkv, D], one layer; H a multiple of Hkv; S >= context_lens + R.
        context_lens: [B] int32, 0 allowed.
        depths: [B, N] int32, 1 <= N <= 256.
        ancestors: [B, N, M] int32 bitmasks; bit i % 32 of word i // 32: node i is visible; own bit included.
        lookahead: [B, P] int32 node of each slot, -1 empty. Ignored when R == N.
        num_offsets: k.
        scale: factor of the scores.
        sliding_window: a row at position p sees positions > p - sliding_window; None for no limit. By position, not
            by slot.

    Returns:
        [B, R, H, D] contiguous, dtype of query; accumulated in float32.

    Raises:
        ValueError, TypeError: a shape, dtype or device that disagrees; on a CPU also lengths past the capacity and
            lookahead nodes out of range.

    Source: tree attention of SpecInfer (arXiv 2305.09781) and Medusa (2401.10774); pseudo rows of FIRP (2410.20488).

    Example:
        >>> import torch, firp_kernels
        >>> ints = lambda *values: torch.tensor([values], dtype=torch.int32)
        >>> values = torch.tensor([8.0, 4.0, 6.0, 0.0]).view(1, 4, 1, 1)  # a context of 1, a root with two children
        >>> depths, ancestors, keys = ints(0, 1, 1), ints(1, 3, 5)[..., None], torch.zeros(1, 4, 1, 1)
        >>> out = firp_kernels.tree_attention(keys[:, 1:], keys, values, ints(1)[0], depths, ancestors, ints(0), 1, 1.0)
        >>> out.flatten().tolist()
        [6.0, 6.0, 4.0]
    """
    return registry.call(
        "tree_attention", impl, query, key_cache, value_cache, context_lens, depths, ancestors, lookahead,
        num_offsets, scale, sliding_window,
    )  # fmt: skip


def fake(query: Tensor, *_: object) -> Tensor:
    return query.new_empty(query.shape)


def check(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, context_lens: Tensor, depths: Tensor, ancestors: Tensor,
    lookahead: Tensor, num_offsets: int, scale: float, sliding_window: int | None = None,
) -> None:  # fmt: skip
    checks.same_device(
        query=query, key_cache=key_cache, value_cache=value_cache, context_lens=context_lens, depths=depths,
        ancestors=ancestors, lookahead=lookahead,
    )  # fmt: skip
    checks.shape("query", query, None, None, None, None)
    batch, rows, heads, head_dim = query.shape
    checks.shape("key_cache", key_cache, batch, None, None, head_dim)
    checks.shape("value_cache", value_cache, *key_cache.shape)
    checks.shape("context_lens", context_lens, batch)
    checks.shape("depths", depths, batch, None)
    num_nodes = depths.shape[1]
    if not 1 <= num_nodes <= checks.MAX_NODES:
        raise ValueError(f"depths: got {num_nodes} nodes, expected 1..{checks.MAX_NODES}")
    checks.shape("ancestors", ancestors, batch, num_nodes, num_words(num_nodes))
    checks.shape("lookahead", lookahead, batch, None)
    checks.dtype("query", query, *checks.FLOATS)
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        checks.dtype(name, cache, query.dtype)
    integers = {"context_lens": context_lens, "depths": depths, "ancestors": ancestors, "lookahead": lookahead}
    for name, tensor in integers.items():
        checks.dtype(name, tensor, torch.int32)
    if heads % key_cache.shape[2]:
        raise ValueError(f"query: {heads} heads are no multiple of the cache's {key_cache.shape[2]} heads")
    if num_offsets < 0:
        raise ValueError(f"num_offsets: got {num_offsets}, expected at least 0")
    with_pseudo = num_nodes + lookahead.shape[1] * num_offsets
    if rows not in (num_nodes, with_pseudo):
        raise ValueError(f"query: got {rows} rows, expected {num_nodes} (nodes) or {with_pseudo} (with pseudo rows)")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window: got {sliding_window}, expected at least 1 or None")
    checks.room(context_lens, rows, key_cache.shape[1])
    checks.between("lookahead", lookahead, -1, num_nodes - 1)


def tree_mask(
    context_lens: Tensor, depths: Tensor, ancestors: Tensor, lookahead: Tensor, num_offsets: int, rows: int,
    sliding_window: int | None = None,
) -> Tensor:  # fmt: skip
    """Which slots of the cache each row sees, as bool [B, R, C + R], where C is the longest context.

    Args:
        context_lens, depths, ancestors, lookahead, num_offsets, sliding_window: as in `tree_attention`.
        rows: R.
    """
    batch, num_nodes = depths.shape
    device = depths.device
    node = torch.arange(num_nodes, device=device).expand(batch, -1)
    offset = torch.zeros_like(node[0])
    chains = torch.zeros(rows, rows, dtype=torch.bool, device=device)
    if rows > num_nodes:
        node = torch.cat([node, lookahead.long().repeat_interleave(num_offsets, 1)], 1)  # [B, R], -1: none
        offset = torch.cat([offset, torch.arange(num_offsets, device=device).repeat(lookahead.shape[1]) + 1])  # [R]
        chain = torch.ones(num_offsets, num_offsets, dtype=torch.bool, device=device).tril()
        chains[num_nodes:, num_nodes:] = torch.block_diag(*[chain] * lookahead.shape[1])
    none, node = node < 0, node.clamp(min=0)

    # Among the rows of the step a row sees the ancestors of its node, and its own chain of pseudo rows.
    above = unpack_ancestors(ancestors, num_nodes).gather(1, node[..., None].expand(-1, -1, num_nodes))  # [B, R, N]
    seen = pad(above & ~none[..., None], (0, rows - num_nodes)) | chains  # [B, R, R]

    # A slot holds the context, or the row of the step that is context_lens before it.
    slots = torch.arange(int(context_lens.max()) + rows, device=device) - context_lens.long()[:, None]  # [B, S + R]
    row_of_slot = slots.clamp(0, rows - 1)
    mask = seen.gather(2, row_of_slot[:, None].expand(-1, rows, -1)) & (slots < rows)[:, None]
    mask |= (slots < 0)[:, None]
    if sliding_window is not None:
        position = depths.long().gather(1, node).masked_fill(none, 0) + offset  # [B, R], after the context
        slot_position = torch.where(slots < 0, slots, position.gather(1, row_of_slot))
        mask &= slot_position[:, None] > position[..., None] - sliding_window
    return mask


def reference(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, context_lens: Tensor, depths: Tensor, ancestors: Tensor,
    lookahead: Tensor, num_offsets: int, scale: float, sliding_window: int | None = None,
) -> Tensor:  # fmt: skip
    """Mask, scores, softmax, values."""
    check(query, key_cache, value_cache, context_lens, depths, ancestors, lookahead, num_offsets, scale, sliding_window)
    rows, group, wide = query.shape[1], query.shape[2] // key_cache.shape[2], checks.computed_in(query.dtype)
    mask = tree_mask(context_lens, depths, ancestors, lookahead, num_offsets, rows, sliding_window)[:, None]
    slots = mask.shape[-1]
    key, value = (cache[:, :slots].to(wide).repeat_interleave(group, 2) for cache in (key_cache, value_cache))
    scores = torch.einsum("brhd,bshd->bhrs", query.to(wide), key) * scale  # [B, H, R, S + R]
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    # A weight of 0 does not stop a NaN, since 0 * NaN is NaN: only the rows that see it get it.
    broken = ~value.isfinite()
    out = torch.einsum("bhrs,bshd->brhd", weights, value.masked_fill(broken, 0))
    sees_broken = torch.einsum("bhrs,bshd->brhd", mask.to(wide).expand_as(weights), broken.to(wide)) > 0
    return out.masked_fill(sees_broken, float("nan")).to(query.dtype).contiguous()


def fallback(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, context_lens: Tensor, depths: Tensor, ancestors: Tensor,
    lookahead: Tensor, num_offsets: int, scale: float, sliding_window: int | None = None,
) -> Tensor:  # fmt: skip
    """The same in fewer operations, where no kernel is built: pseudo rows are scored against their own chains alone.

    A row's softmax over context and nodes is joined with that over its chain, so the node rows' weights never meet a
    pseudo row.
    """
    check(query, key_cache, value_cache, context_lens, depths, ancestors, lookahead, num_offsets, scale, sliding_window)
    batch, rows = query.shape[:2]
    kv_heads, num_nodes, wide = key_cache.shape[2], depths.shape[1], checks.computed_in(query.dtype)
    shared = int(context_lens.max()) + num_nodes
    live = torch.arange(shared, device=query.device) < context_lens[:, None] + num_nodes  # [B, S + N]
    mask = tree_mask(context_lens, depths, ancestors, lookahead, num_offsets, rows, sliding_window)[..., :shared]
    key = key_cache[:, :shared].to(wide).permute(0, 2, 3, 1)  # [B, Hkv, D, S + N]
    value = value_cache[:, :shared].to(wide).masked_fill(~live[..., None, None], 0).transpose(1, 2)
    grouped = query.to(wide).unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)  # [B, Hkv, H / Hkv, R, D]
    scores = (grouped.flatten(2, 3) @ key).unflatten(2, grouped.shape[2:4]) * scale
    scores = scores.masked_fill(~(mask & live[:, None])[:, None, None], float("-inf"))

    def softened(part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Peak and sum of a softmax, and the values under its weights, not yet divided by the sum."""
        peak = part.amax(-1, keepdim=True).clamp(min=torch.finfo(wide).min)
        weights = (part - peak).exp()
        return peak, weights.sum(-1, keepdim=True), (weights.flatten(2, 3) @ value).unflatten(2, weights.shape[2:4])

    _, total, node_out = softened(scores[..., :num_nodes, :])
    out = [node_out / total]
    if rows > num_nodes:
        sequence = torch.arange(batch, device=query.device)[:, None]
        offset = torch.arange(num_offsets, device=query.device)
        slots = context_lens.long()[:, None] + torch.arange(num_nodes, rows, device=query.device)
        own_key, own_value = (
            cache[sequence, slots].to(wide).unflatten(1, (-1, num_offsets)).permute(0, 3, 1, 2, 4)
            for cache in (key_cache, value_cache)
        )  # [B, Hkv, P, k, D]
        own_query = grouped[..., num_nodes:, :].unflatten(3, (-1, num_offsets))
        chain = torch.einsum("bhgpid,bhpjd->bhgpij", own_query, own_key) * scale
        distance = offset[:, None] - offset
        seen = (distance >= 0) & (distance < (sliding_window or num_offsets))
        chain = chain.masked_fill(~seen, float("-inf"))
        peak, total, base = (part.unflatten(3, (-1, num_offsets)) for part in softened(scores[..., num_nodes:, :]))
        joint = torch.maximum(peak, chain.amax(-1, keepdim=True))
        weights, own = (chain - joint).exp(), torch.where(seen[..., None], own_value[:, :, None, :, None], 0)
        numerator = base * (peak - joint).exp() + (weights[..., None] * own).sum(-2)
        denominator = total * (peak - joint).exp() + weights.sum(-1, keepdim=True)
        out.append((numerator / denominator).flatten(3, 4))
    return torch.cat(out, 3).permute(0, 3, 1, 2, 4).reshape(query.shape).to(query.dtype).contiguous()
