"""Prefill: pass prompts through the model and fill the cache, one by one or as right-padded batches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right
from torch.nn.utils.rnn import pad_sequence
from transformers import PretrainedConfig

from firp.decoder.rotary import check_positions
from firp.decoder.view import DecoderView
from firp_kernels.bitmask import pack_ancestors

# Rows that pass the model at once. A CPU gains nothing from more; on a GPU layers of small models are bound by
# launches.
CHUNK_TOKENS = 1024
GPU_CHUNK_TOKENS = 4096
# Prompts and rows, padding included, of a pass that is captured: past them a GPU is busy for longer than launches take.
CAPTURED_PROMPTS = 8
CAPTURED_ROWS = 2048
SMALLEST_LENGTH = 32
# Rows of a chunk that `tree_attention` takes at a time; measured on a CPU, where 16, 32 and 128 are no faster.
CHAIN_ROWS = 64


def check_prompts(config: PretrainedConfig, lengths: list[int], max_new_tokens: int) -> None:
    """Raise ValueError, with the numbers, for a request that cannot be decoded."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: got {max_new_tokens}, expected at least 1")
    if not lengths:
        raise ValueError("input_ids: got no prompts, expected at least one")
    for row, length in enumerate(lengths):
        if length < 1:
            raise ValueError(f"input_ids: got an empty prompt in row {row}, expected at least one token")
        check_positions(config, length, max_new_tokens)


def default_chunk(device: torch.device) -> int:
    """Rows that pass the model at once on `device`."""
    return GPU_CHUNK_TOKENS if device.type == "cuda" else CHUNK_TOKENS


def most_rows(device: torch.device, slots: int, batch_size: int) -> int:
    """Rows that pass the model at once at most, for prompts of up to `slots` tokens in the batches of `prefill`."""
    prompts_together = batch_size if device.type == "cuda" else 1
    return min(default_chunk(device), slots * prompts_together)


def padded_length(length: int) -> int:
    """Tokens that captured prompts of up to `length` are padded to: an eighth of a power of two at a time, so that few
    lengths serve all and a long prompt is padded by little."""
    step = max(SMALLEST_LENGTH, (1 << (length - 1).bit_length()) // 8)
    return -(-length // step) * step


def prompt_batches(lengths: list[int], rows: int) -> list[list[int]]:
    """Group prompts into right-padded batches of at most `rows` rows, padding included, the longest prompts first.

    Only prompts of similar length share a batch, so padding is bounded: the longest prompts that no batch has taken
    decide how many join. A prompt of more than `rows` tokens is alone; an empty one is left out.

    Args:
        lengths: tokens of each prompt.

    Returns:
        The places of each batch's prompts in `lengths`.
    """
    order = sorted((place for place, length in enumerate(lengths) if length), key=lambda place: -lengths[place])
    batches = []
    while order:
        count = max(1, rows // lengths[order[0]])
        batches.append(order[:count])
        order = order[count:]
    return batches


class Filled(Exception):
    """The last layer's keys and values are in the cache: nothing needs the rows that would come after them."""


@dataclass
class PrefillAttention:
    """Causal attention of a chunk of prompts over the chunk and what is before it in the cache.

    Prompts are padded on the right: no row of a prompt sees its padding, which comes after it. The padding's keys and
    values go to slots past the prompt, which may hold anything.

    Attributes:
        cache: [L, 2, B, S, Hkv, D].
        places: which sequences of the cache the prompts fill: a slice of one, or a tensor [n] int64 of several, whose
            chunk begins at 0.
        start: tokens of each prompt already in the cache.
        tree_attention: the op that decoding uses, for one prompt; a block of rows is a tree of one branch to it, and
            what is before the block is context. None takes torch's own attention.
    """

    cache: Tensor
    places: slice | Tensor
    start: int
    tree_attention: Callable[..., Tensor] | None

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float, sliding_window: int | None
    ) -> Tensor:
        """Raises Filled in the last layer."""
        stop = self.start + query.shape[1]
        key_cache, value_cache = self.cache[module.layer_idx]
        key_cache[self.places, self.start : stop] = key
        value_cache[self.places, self.start : stop] = value
        if module.layer_idx == len(self.cache) - 1:
            raise Filled
        if self.tree_attention is not None:
            caches = key_cache[self.places], value_cache[self.places]
            return self._by_chains(self.tree_attention, query, *caches, scale, sliding_window)
        if self.start:
            key, value = (rows[self.places, :stop] for rows in (key_cache, value_cache))
        window = None if sliding_window is None or sliding_window >= stop else sliding_window
        query, key, value = (rows.transpose(1, 2) for rows in (query, key, value))
        return causal_attention(query, key, value, scale, window).transpose(1, 2)

    def _by_chains(
        self,
        attention: Callable[..., Tensor],
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        scale: float,
        sliding_window: int | None,
    ) -> Tensor:
        none = torch.empty(1, 0, dtype=torch.int32)
        attended = []
        for first in range(0, query.shape[1], CHAIN_ROWS):
            rows = query[:, first : first + CHAIN_ROWS]
            context = torch.tensor([self.start + first], dtype=torch.int32)
            attended.append(
                attention(rows, key_cache, value_cache, context, *chain(rows.shape[1]), none, 0, scale, sliding_window)
            )
        return torch.cat(attended, 1)


@functools.cache
def chain(num_nodes: int) -> tuple[Tensor, Tensor]:
    """Depths [1, N] and ancestors [1, N, M] of a tree of one branch."""
    visible = torch.ones(1, num_nodes, num_nodes, dtype=torch.bool).tril()
    return torch.arange(num_nodes, dtype=torch.int32)[None], pack_ancestors(visible)


def causal_attention(query: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None) -> Tensor:
    """Attention of the last R of S positions over all positions up to each: [B, H, R, D] over [B, Hkv, S, D].

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


Batch = Callable[[list[Tensor], list[int]], None]


@torch.no_grad()
def prefill(
    view: DecoderView,
    prompts: list[Tensor],
    cache: Tensor,
    chunk_tokens: int | None = None,
    tree_attention: Callable[..., Tensor] | None = None,
    batch: Batch | None = None,
) -> None:
    """Write keys and values of prompts into a cache, in chunks.

    On a GPU ragged prompts pass together. On a CPU they pass one by one: there the last bits of a row may depend on how
    many rows a linear layer holds.

    Args:
        prompts: B prompts [T] int64 without their last token.
        cache: [L, 2, B, S, Hkv, D].
        chunk_tokens: rows that pass the model at once, padding included; None takes the device's default.
        tree_attention: see `PrefillAttention`; on a CPU.
        batch: passes prompts together into their places of the cache; None takes `prefill_batch`.
    """
    chunk_tokens = chunk_tokens or default_chunk(view.device)
    together = chunk_tokens if view.device.type == "cuda" else 1
    for places in prompt_batches([len(prompt) for prompt in prompts], together):
        rows = [prompts[place] for place in places]
        if batch is None:
            prefill_batch(view, rows, cache, places, chunk_tokens, tree_attention)
        else:
            batch(rows, places)


@torch.no_grad()
def prefill_batch(
    view: DecoderView,
    prompts: list[Tensor],
    cache: Tensor,
    places: list[int],
    chunk_tokens: int,
    tree_attention: Callable[..., Tensor] | None = None,
) -> None:
    """Pass prompts through the model together, padded on the right; one prompt alone in chunks of `chunk_tokens`.

    Args:
        prompts: n prompts [T] int64 without their last token, none of them empty.
        cache: [L, 2, B, S, Hkv, D]; the places are written as far as the longest prompt reaches.
        places: which sequence of the cache each prompt fills.
    """
    device, together = view.device, len(prompts) > 1
    tokens = pad_sequence(prompts, batch_first=True).to(device)
    lengths = torch.tensor([len(prompt) + 1 for prompt in prompts], device=device)
    rows = torch.tensor(places, device=device) if together else slice(places[0], places[0] + 1)
    chunk_tokens = tokens.shape[1] if together else chunk_tokens
    for start in range(0, tokens.shape[1], chunk_tokens):
        chunk = tokens[:, start : start + chunk_tokens]
        pass_chunk(view, chunk, lengths, PrefillAttention(cache, rows, start, tree_attention))


def pass_chunk(view: DecoderView, tokens: Tensor, lengths: Tensor, step: PrefillAttention) -> None:
    """Fill the cache with the tokens [n, T] of prompts of the lengths [n], last tokens included."""
    position_ids = torch.arange(step.start, step.start + tokens.shape[1], device=tokens.device).expand(tokens.shape)
    hidden = view.embed(tokens)
    with suppress(Filled):
        view.run_layers(hidden, view.rotary(hidden, position_ids, lengths), step, 0, view.num_layers)
