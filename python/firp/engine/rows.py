"""Which rows a step holds: positions of node and pseudo rows, and whether they pass the head together."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from firp.decoder.view import DecoderView
from firp.engine.layers import fused

# Pseudo rows of a sequence that share the head's pass with the node rows: reading the head twice costs more. On a GPU
# all rows of a step count, up to where their products take longer than reading the head.
SHARED_PSEUDO_ROWS = 16
SHARED_ROWS = 192

Rotary = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def row_positions(depths: Tensor, lookahead: Tensor, context_lens: Tensor, num_offsets: int) -> Tensor:
    """Positions of the node rows, then of the pseudo rows, [B, N + P*k] int64.

    Args:
        depths, lookahead: [B, N], [B, P] int32 of the tree.
        context_lens: [B] int32.
        num_offsets: k.
    """
    positions = (context_lens[:, None] + depths).long()
    if lookahead.shape[1] == 0:
        return positions
    base = positions.gather(1, lookahead.long().clamp(min=0))
    offsets = torch.arange(1, num_offsets + 1, device=positions.device)
    return torch.cat([positions, (base[..., None] + offsets).flatten(1)], 1)


def row_rotary(
    rotary: Rotary, hidden: Tensor, depths: Tensor, lookahead: Tensor, context_lens: Tensor, num_offsets: int
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, N + P*k, D] of a step's rows, in the dtype of `hidden`; others as in `row_positions`."""
    return rotary(hidden, row_positions(depths, lookahead, context_lens, num_offsets))


def final_norm(norm: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """Rows [..., d] after the last layer through the norm before the head."""
    return norm(hidden)


def fuse_beside_layers(view: DecoderView, compiled: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    """`row_rotary` over the view's rotary embedding; where `compiled`, few kernels for it and for the final norm.

    Frequencies that follow the length of a sequence stay as they are.
    """
    fuse = fused if compiled else lambda function: function
    view.norm = functools.partial(fuse(final_norm), view.norm)
    if view.fixed_rotary is None:
        return functools.partial(row_rotary, view.rotary)
    return functools.partial(fuse(row_rotary), view.fixed_rotary)


def few_rows(device: torch.device, batch_size: int, num_rows: int, num_nodes: int) -> bool:
    """Whether the N + P*k rows of each of B sequences, N of them nodes, are few enough to pass the head together."""
    if device.type == "cpu":
        return num_rows - num_nodes <= SHARED_PSEUDO_ROWS
    return batch_size * num_rows <= SHARED_ROWS
