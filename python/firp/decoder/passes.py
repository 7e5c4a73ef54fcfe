"""Whole sequences through the decoder in one pass: the model's own rows, and pseudo rows of chosen anchors over
them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from firp.decoder.view import DecoderView


@dataclass(frozen=True)
class RealRows:
    """Rows of whole sequences in the base model.

    Attributes:
        inserted: [B, T, d] hidden states after the insertion layer.
        final: [B, T, d] hidden states after the last layer.
        recorded: keys and values [B, Hkv, T, D], key after rotary, of every layer above the insertion layer.
    """

    inserted: Tensor
    final: Tensor
    recorded: dict[int, tuple[Tensor, Tensor]]


def expand_groups(rows: Tensor, num_heads: int) -> Tensor:
    """[B, Hkv, R, D] to [B, H, R, D]."""
    return rows.repeat_interleave(num_heads // rows.shape[1], dim=1)


@dataclass(frozen=True)
class Packing:
    """Where sequences lie in rows that hold several, end to end.

    Attributes:
        rows: [B] row of each sequence, and `starts` [B] its first place there.
        lengths: [B] its tokens.
        shape: (rows, places of a row).
    """

    rows: Tensor
    starts: Tensor
    lengths: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, lengths: Tensor, capacity: int) -> Packing:
        """Sequences of `lengths` [B], the longest first, each in the first row of `capacity` places with room."""
        rows, starts, filled = torch.zeros_like(lengths), torch.zeros_like(lengths), []  # type: ignore[var-annotated]
        for b in lengths.argsort(descending=True, stable=True).tolist():
            length = int(lengths[b])
            row = next((r for r, taken in enumerate(filled) if taken + length <= capacity), len(filled))
            filled += [0] * (row == len(filled))
            rows[b], starts[b] = row, filled[row]
            filled[row] += length
        return cls(rows, starts, lengths, (len(filled), max(filled, default=0)))

    def places(self, length: int) -> tuple[Tensor, Tensor]:
        """Place [B, length] of each token in the rows joined, 0 for padding, and whether it is a token."""
        position = torch.arange(length)
        real = position < self.lengths[:, None]
        return ((self.rows * self.shape[1] + self.starts)[:, None] + position).masked_fill(~real, 0), real


@dataclass
class RecordingAttention:
    """Causal attention over whole sequences that keeps keys and values from layer `record_from` on.

    `documents` [B, T] number the sequences of packed rows: none sees another's tokens.
    """

    record_from: int
    recorded: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    documents: Tensor | None = None

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float, sliding_window: int | None
    ) -> Tensor:
        query, key, value = (rows.transpose(1, 2) for rows in (query, key, value))
        if module.layer_idx >= self.record_from:
            self.recorded[module.layer_idx] = (key, value)
        length, heads = query.shape[2], query.shape[1]
        mask = None
        window = length if sliding_window is None else min(sliding_window, length)
        if window < length or self.documents is not None:
            position = torch.arange(length, device=query.device)
            distance = position[:, None] - position
            mask = (distance >= 0) & (distance < window)
        if self.documents is not None:
            mask = (mask & (self.documents[:, :, None] == self.documents[:, None]))[:, None]
        out = functional.scaled_dot_product_attention(
            query,
            expand_groups(key, heads),
            expand_groups(value, heads),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
        )
        return out.transpose(1, 2)


@torch.no_grad()
def real_rows(view: DecoderView, tokens: Tensor, insertion_layer: int, packing: Packing | None = None) -> RealRows:
    """Run whole sequences, tokens [B, T], once without gradient.

    With a `packing` they pass the layers in its rows. The result is laid out as without one; what stands in the padding
    is of no meaning.
    """
    step = RecordingAttention(record_from=insertion_layer)
    position_ids = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    if packing is not None:
        places, real = (tensor.to(tokens.device) for tensor in packing.places(tokens.shape[1]))
        size = packing.shape[0] * packing.shape[1]
        numbers = torch.arange(len(tokens), device=tokens.device)[:, None].expand(tokens.shape)
        packed = [
            tokens.new_full((size,), fill).scatter(0, places[real], values[real]).view(packing.shape)
            for values, fill in ((tokens, 0), (position_ids, 0), (numbers, -1))
        ]
        tokens, position_ids, step.documents = packed
    embedded = view.embed(tokens)
    position_embeddings = view.rotary(embedded, position_ids)
    inserted = view.run_layers(embedded, position_embeddings, step, 0, insertion_layer)
    final = view.run_layers(inserted, position_embeddings, step, insertion_layer, view.num_layers)
    if packing is None:
        return RealRows(inserted, final, step.recorded)
    apart = {
        layer: tuple(rows.transpose(1, 2).flatten(0, 1)[places].transpose(1, 2) for rows in kept)
        for layer, kept in step.recorded.items()
    }
    return RealRows(inserted.flatten(0, 1)[places], final.flatten(0, 1)[places], apart)  # type: ignore[arg-type]


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

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float, sliding_window: int | None
    ) -> Tensor:
        query, key, value = (rows.transpose(1, 2) for rows in (query, key, value))
        batch, heads, _, width = query.shape
        anchors, k = self.anchors.shape[1], self.num_offsets
        real_key, real_value = (expand_groups(rows, heads) for rows in self.recorded[module.layer_idx])
        chains = [
            rows.reshape(batch, heads, anchors, k, width)
            for rows in (query, expand_groups(key, heads), expand_groups(value, heads))
        ]
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

        precise = torch.promote_types(query.dtype, torch.float32)
        weights = torch.softmax(torch.cat([real, chain], dim=-1), dim=-1, dtype=precise).to(query.dtype)
        own = weights[..., -k:].reshape(batch, heads, anchors, k, k)
        out = torch.matmul(weights[..., :-k], real_value) + torch.matmul(own, value_chain).reshape(query.shape)
        return out.transpose(1, 2)


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
