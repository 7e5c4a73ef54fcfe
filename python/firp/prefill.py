"""Prefill: pass the prompt through the model and fill the cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from firp.layer_view import DecoderView

CHUNK_TOKENS = 1024


@dataclass
class PrefillAttention:
    """Causal attention of a chunk of one prompt over the chunk and what lies before it in the cache.

    Attributes:
        cache: [L, 2, S, Hkv, D] of one sequence.
        start: tokens already in the cache.
    """

    cache: Tensor
    start: int

    def attend(self, module, query, key, value, scale, sliding_window):
        length, stop = query.shape[2], self.start + query.shape[2]
        key_cache, value_cache = self.cache[module.layer_idx]
        key_cache[self.start : stop] = key[0].transpose(0, 1)
        value_cache[self.start : stop] = value[0].transpose(0, 1)
        group = query.shape[1] // key.shape[1]
        keys, values = (
            rows[:stop].transpose(0, 1)[None].repeat_interleave(group, dim=1) for rows in (key_cache, value_cache)
        )
        mask = None
        windowed = sliding_window is not None and sliding_window < stop
        if self.start or windowed:
            row = torch.arange(self.start, stop, device=query.device)[:, None]
            column = torch.arange(stop, device=query.device)
            mask = column <= row
            if windowed:
                mask &= column > row - sliding_window
        out = functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=mask is None and length > 1, scale=scale
        )
        return out.transpose(1, 2)


@torch.no_grad()
def prefill(view: DecoderView, tokens: Tensor, cache: Tensor, chunk_tokens: int = CHUNK_TOKENS) -> None:
    """Write keys and values of `tokens` [T] into `cache` [L, 2, S, Hkv, D], in chunks, positions from 0."""
    for start in range(0, len(tokens), chunk_tokens):
        chunk = tokens[start : start + chunk_tokens][None]
        position_ids = torch.arange(start, start + chunk.shape[1], device=tokens.device)[None]
        hidden = view.embed(chunk)
        view.run_layers(
            hidden, view.rotary(hidden, position_ids), PrefillAttention(cache, start), 0, view.num_layers
        )
