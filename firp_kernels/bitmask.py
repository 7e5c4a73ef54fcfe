"""Ancestor bitmasks: which nodes of a tree each node sees, 32 to a word."""

from __future__ import annotations

import torch
from torch import Tensor

WORD_BITS = 32


def num_words(num_nodes: int) -> int:
    """M, the mask words of a node in a tree of `num_nodes`."""
    return (num_nodes + WORD_BITS - 1) // WORD_BITS


def unpack_ancestors(ancestors: Tensor, num_nodes: int) -> Tensor:
    """Bitmask words [B, N, M] to bool [B, N, N]; entry [b, i, a]: node a is i or an ancestor of i."""
    bits = torch.arange(WORD_BITS, device=ancestors.device, dtype=torch.int32)
    flat = ((ancestors[..., None] >> bits) & 1).flatten(-2)
    return flat[..., :num_nodes].bool()


def pack_ancestors(visible: Tensor) -> Tensor:
    """Bool [B, N, N] to bitmask words [B, N, M] int32; the inverse of `unpack_ancestors`."""
    num_nodes = visible.shape[-1]
    words = num_words(num_nodes)
    padded = torch.nn.functional.pad(visible.long(), (0, words * WORD_BITS - num_nodes))
    weights = 1 << torch.arange(WORD_BITS, device=visible.device, dtype=torch.int64)
    unsigned = (padded.unflatten(-1, (words, WORD_BITS)) * weights).sum(-1)
    return torch.where(unsigned >= 2**31, unsigned - 2**32, unsigned).to(torch.int32)
