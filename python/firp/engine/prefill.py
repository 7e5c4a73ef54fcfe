"""Prefill: pass the prompt through the model and fill the cache."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from firp.decoder.view import DecoderView
from firp_kernels.bitmask import pack_ancestors

CHUNK_TOKENS = 1024
# Rows of a chunk that `tree_attention` takes at a time; measured on a CPU, where 16, 32 and 128 are no faster.
CHAIN_ROWS = 64


@dataclass
class PrefillAttention:
    """Causal attention of a chunk of one prompt over the chunk and what lies before it in the cache.

    Attributes:
        cache: [L, 2, S, Hkv, D] of one sequence.
        start: tokens already in the cache.
        tree_attention: the op that decoding uses; a block of rows is a tree of one branch to it, and what lies before
            the block is context. None takes torch's own attention.
    """

    cache: Tensor
    start: int
    tree_attention: Callable[..., Tensor] | None

    def attend(self, module, query, key, value, scale, sliding_window):
        stop = self.start + query.shape[1]
        key_cache, value_cache = self.cache[module.layer_idx]
        key_cache[self.start : stop] = key[0]
        value_cache[self.start : stop] = value[0]
        if self.tree_attention is not None:
            return self._by_chains(query, key_cache[None], value_cache[None], scale, sliding_window)
        keys, values = (rows[:stop].transpose(0, 1)[None] for rows in (key_cache, value_cache))
        window = None if sliding_window is None or sliding_window >= stop else sliding_window
        return causal_attention(query.transpose(1, 2), keys, values, scale, window).transpose(1, 2)

    def _by_chains(self, query, key_cache, value_cache, scale, sliding_window):
        none = torch.empty(1, 0, dtype=torch.int32)
        attended = []
        for first in range(0, query.shape[1], CHAIN_ROWS):
            rows = query[:, first : first + CHAIN_ROWS]
            context = torch.tensor([self.start + first], dtype=torch.int32)
            attended.append(
                self.tree_attention(
                    rows, key_cache, value_cache, context, *chain(rows.shape[1]), none, 0, scale, sliding_window
                )
            )
        return torch.cat(attended, 1)


@functools.cache
def chain(num_nodes: int) -> tuple[Tensor, Tensor]:
    """Depths [1, N] and ancestors [1, N, M] of a tree of one branch."""
    visible = torch.ones(1, num_nodes, num_nodes, dtype=torch.bool).tril()
    return torch.arange(num_nodes, dtype=torch.int32)[None], pack_ancestors(visible)


def causal_attention(query: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None) -> Tensor:
    """Attention of the last R of S positions over all positions up to each: [1, H, R, D] over [1, Hkv, S, D].

    On a GPU the lower right causal mask needs no tensor, and the flash kernel, for 16-bit numbers, takes the heads'
    groups as they are. Elsewhere keys and values are expanded over their group; on a CPU, and in a window, all but
    whole prompts take a dense mask.
    """
    rows, length = query.shape[2], keys.shape[2]
    if window is None and rows == length:
        mask, causal = None, rows > 1
    elif window is None and query.device.type == "cuda":
        mask, causal = causal_lower_right(rows, length), False
    else:
        row = torch.arange(length - rows, length, device=query.device)[:, None]
        column = torch.arange(length, device=query.device)
        mask, causal = column <= row, False
        if window is not None:
            mask &= column > row - window
    grouped = query.device.type == "cuda" and window is None and query.dtype in (torch.float16, torch.bfloat16)
    if not grouped:
        group = query.shape[1] // keys.shape[1]
        keys, values = (rows.repeat_interleave(group, dim=1) for rows in (keys, values))
    return functional.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )


@torch.no_grad()
def prefill(
    view: DecoderView,
    tokens: Tensor,
    cache: Tensor,
    chunk_tokens: int = CHUNK_TOKENS,
    tree_attention: Callable[..., Tensor] | None = None,
) -> None:
    """Write keys and values of `tokens` [T], a prompt without its last token, into `cache` [L, 2, S, Hkv, D], in chunks.

    `tree_attention`: see `PrefillAttention`.
    """
    for start in range(0, len(tokens), chunk_tokens):
        chunk = tokens[start : start + chunk_tokens][None]
        position_ids = torch.arange(start, start + chunk.shape[1], device=tokens.device)[None]
        hidden = view.embed(chunk)
        step = PrefillAttention(cache, start, tree_attention)
        view.run_layers(hidden, view.rotary(hidden, position_ids, len(tokens) + 1), step, 0, view.num_layers)
