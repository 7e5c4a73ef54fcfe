"""From a verified path to the tokens a step emits: cut at a stop token and at the limit, on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from firp.engine.state import DecodeState, gather_rows
from firp_kernels import Verified


def emit(state: DecodeState, chosen: Verified) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of the accepted nodes and the bonus token, as far as a sequence may still emit; updates `remaining`.

    Args:
        state: before the commit.
        chosen: from `verify_tree`.

    Returns:
        tokens [B, max_depth + 1] int64, -1 past the end; counts [B] int64, 0 for a finished sequence; ended [B] bool,
        where a stop token, the limit or NaN scores end the sequence with this step.
    """
    path, num_accepted, bonus = chosen.path, chosen.num_accepted, chosen.bonus
    accepted = gather_rows(state.tree.tokens, path[:, 1:].long().clamp(min=0))
    index = torch.arange(path.shape[1], device=path.device)
    tokens = torch.cat([accepted, bonus[:, None]], 1)
    tokens = torch.where(index == num_accepted[:, None], bonus[:, None], tokens)
    broken = chosen.status != 0
    counts = torch.minimum(num_accepted.long() + 1, state.remaining)
    counts = counts.masked_fill(state.finished | broken, 0)
    stops = (tokens[..., None] == state.stop_tokens).any(-1) & (index < counts[:, None])
    stopped = stops.any(1)
    counts = torch.where(stopped, stops.int().argmax(1) + 1, counts)
    state.remaining.sub_(counts)
    return tokens.masked_fill(index >= counts[:, None], -1), counts, stopped | (state.remaining == 0) | broken


def pack(tokens: Tensor, counts: Tensor, finished: Tensor, status: Tensor) -> Tensor:
    """[B, max_depth + 4] int64: tokens, then counts, finished and status."""
    return torch.cat([tokens, torch.stack([counts, finished.long(), status.long()], 1)], 1)
