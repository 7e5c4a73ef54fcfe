"""The training objective: KL from the base model's own distribution to that of the pseudo rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from firp.layer_view import DecoderView
from firp.train.data import Batch
from firp.train.rows import RealRows, expand_groups


@dataclass
class PseudoAttention:
    """Pseudo rows of anchors over recorded real rows: positions up to the anchor, and their own chain.

    Attributes:
        recorded: keys and values [B, Hkv, T, D] of the real rows, per layer.
        anchors: [B, A] positions.
        num_offsets: k; rows are ordered anchor by anchor, offset by offset.
    """

    recorded: dict[int, tuple[Tensor, Tensor]]
    anchors: Tensor
    num_offsets: int

    def attend(self, module, query, key, value, scale, sliding_window):
        query, key, value = (rows.transpose(1, 2) for rows in (query, key, value))
        batch, heads, _, width = query.shape
        anchors, k = self.anchors.shape[1], self.num_offsets
        real_key, real_value = (expand_groups(rows, heads) for rows in self.recorded[module.layer_idx])
        chains = [rows.reshape(batch, heads, anchors, k, width) for rows in (query, expand_groups(key, heads), expand_groups(value, heads))]
        query_chain, key_chain, value_chain = chains

        real = torch.matmul(query, real_key.transpose(2, 3)) * scale
        real_positions = torch.arange(real_key.shape[2], device=query.device)
        hidden = real_positions > self.anchors.repeat_interleave(k, dim=1)[..., None]
        if sliding_window is not None:
            offsets = torch.arange(1, k + 1, device=query.device)
            positions = (self.anchors[..., None] + offsets).flatten(1)
            hidden |= real_positions <= positions[..., None] - sliding_window
        real = real.masked_fill(hidden[:, None], float("-inf"))

        chain = torch.matmul(query_chain, key_chain.transpose(3, 4)) * scale
        future = torch.ones(k, k, dtype=torch.bool, device=query.device).triu(1)
        chain = chain.masked_fill(future, float("-inf")).reshape(batch, heads, anchors * k, k)

        weights = torch.softmax(torch.cat([real, chain], dim=-1), dim=-1, dtype=torch.float32).to(query.dtype)
        own = weights[..., -k:].reshape(batch, heads, anchors, k, k)
        out = torch.matmul(weights[..., :-k], real_value) + torch.matmul(own, value_chain).reshape(query.shape)
        return out.transpose(1, 2)


def sample_anchors(batch: Batch, num_offsets: int, anchors: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw anchor positions in the answers, without replacement.

    An anchor's k targets must lie inside the sequence. Memory is bounded by `anchors`, whatever the length.

    Returns:
        anchors [B, A] int64, and valid [B, A] bool (short answers leave invalid anchors, which point at 0).
    """
    batch_size, length = batch.tokens.shape
    position = torch.arange(length)
    first = (batch.prompt_lengths - 1).clamp(min=0)
    allowed = (position >= first[:, None]) & (position + num_offsets < batch.lengths[:, None])
    priority = torch.rand(batch_size, length, generator=generator).masked_fill(~allowed, -1.0)
    top = priority.topk(min(anchors, length), dim=1)
    valid = top.values >= 0
    return top.indices.masked_fill(~valid, 0), valid


def pseudo_rows(view: DecoderView, weight: Tensor, real: RealRows, anchors: Tensor, insertion_layer: int) -> Tensor:
    """Predict at the anchors [B, A] and pass the pseudo rows through the layers above: [B, A, k, d]."""
    _batch, count = anchors.shape
    k = weight.shape[0]
    at_anchor = real.inserted.gather(1, anchors[..., None].expand(-1, -1, real.inserted.shape[-1]))
    rows = torch.einsum("kod,bad->bako", weight.to(at_anchor.dtype), at_anchor).flatten(1, 2)
    position_ids = (anchors[..., None] + torch.arange(1, k + 1, device=anchors.device)).flatten(1)
    step = PseudoAttention(real.recorded, anchors, k)
    rows = view.run_layers(rows, view.rotary(rows, position_ids), step, insertion_layer, view.num_layers)
    return rows.unflatten(1, (count, k))


@dataclass(frozen=True)
class OffsetScores:
    """Sums over anchors, per offset [k]: KL, and how often the model's choice is in the top 1 / 4 / 10."""

    kl: Tensor
    top1: Tensor
    top4: Tensor
    top10: Tensor
    count: int


def _score(pseudo_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """KL per (anchor, offset), and the rank of the teacher's choice in the pseudo row's scores."""
    teacher = torch.log_softmax(teacher_logits.float(), dim=-1)
    student = torch.log_softmax(pseudo_logits.float(), dim=-1)
    kl = functional.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
    with torch.no_grad():
        choice = teacher.argmax(-1, keepdim=True)
        rank = (student > student.gather(-1, choice)).sum(-1)
    return kl, rank


def kl_objective(
    view: DecoderView,
    weight: Tensor,
    real: RealRows,
    insertion_layer: int,
    anchors: Tensor,
    valid: Tensor,
    offset_weights: Tensor,
    want_gradient: bool,
) -> tuple[OffsetScores, Tensor | None]:
    """Mean over anchors of sum_j offset_weights[j] * KL(model at i + j || pseudo[i, j]), and its gradient.

    The head runs sequence by sequence, so that at most [max(T, A * k), V] scores are alive.

    Returns:
        per-offset sums, and the gradient for `weight` [k, d, d] (None unless wanted).
    """
    k = weight.shape[0]
    with torch.set_grad_enabled(want_gradient):
        rows = pseudo_rows(view, weight, real, anchors, insertion_layer)
    leaf = rows.detach().requires_grad_(want_gradient)
    total = max(int(valid.sum()), 1)
    sums = torch.zeros(4, k, device=weight.device)
    offsets = torch.arange(1, k + 1, device=anchors.device)
    for b in range(anchors.shape[0]):
        chosen = anchors[b][valid[b]]
        if not len(chosen):
            continue
        targets, inverse = (chosen[:, None] + offsets).unique(return_inverse=True)
        with torch.no_grad():
            teacher = view.logits(real.final[b, targets])
        with torch.set_grad_enabled(want_gradient):
            kl, rank = _score(view.logits(leaf[b][valid[b]]), teacher[inverse])
            if want_gradient:
                ((kl * offset_weights).sum() / total).backward(inputs=[leaf])
        sums += torch.stack([kl.detach().sum(0), *((rank < n).sum(0).float() for n in (1, 4, 10))])
    gradient = None
    if want_gradient:
        (gradient,) = torch.autograd.grad(rows, weight, leaf.grad)
    return OffsetScores(*sums.cpu(), count=total), gradient
