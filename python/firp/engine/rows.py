"""Which rows a step holds: positions of node and pseudo rows, and the pseudo rows that the next tree is drafted from."""

from __future__ import annotations

import torch
from torch import Tensor

from firp.decoder.view import DecoderView
from firp.drafting.trees import DraftTree
from firp.engine.state import gather_rows
from firp_kernels import Verified

# Pseudo rows of a sequence that share the head's pass with the node rows: reading the head twice costs more. On a GPU all
# rows of a step count, up to where their products take longer than reading the head.
SHARED_PSEUDO_ROWS = 16
SHARED_ROWS = 192


def row_positions(tree: DraftTree, context_lens: Tensor, num_offsets: int) -> Tensor:
    """Positions of the node rows, then of the pseudo rows, [B, N + P*k] int64."""
    positions = (context_lens[:, None] + tree.depths).long()
    if tree.size[1] == 0:
        return positions
    base = gather_rows(positions, tree.lookahead.long().clamp(min=0))
    offsets = torch.arange(1, num_offsets + 1, device=positions.device)
    return torch.cat([positions, (base[..., None] + offsets).flatten(1)], 1)


def few_rows(rows: Tensor, num_nodes: int) -> bool:
    """Whether node and pseudo rows [B, N + P*k, d] are few enough to pass the head together."""
    if rows.device.type == "cpu":
        return rows.shape[1] - num_nodes <= SHARED_PSEUDO_ROWS
    return rows.shape[:2].numel() <= SHARED_ROWS


def pseudo_scores(
    view: DecoderView, pseudo: Tensor, are_logits: bool, chosen: Verified, num_offsets: int
) -> tuple[Tensor, Tensor]:
    """Scores that hold the pseudo rows of each sequence's lookahead slot, and which rows of them these are.

    Where the slot is m levels up, its offsets m + 1 .. k are for depths 1 .. k - m.

    Args:
        pseudo: [B, P*k, V] scores where `are_logits`, else [B, P*k, d] hidden states, of which only k rows are scored.
        chosen: of this step, with the slot and its levels.

    Returns:
        scores [B, *, V]; rows [B, k] int64.
    """
    offset = (torch.arange(num_offsets, device=pseudo.device) + chosen.levels_up[:, None]).clamp(max=num_offsets - 1)
    rows = chosen.last_slot.long().clamp(min=0)[:, None] * num_offsets + offset
    if are_logits:
        return pseudo, rows
    return view.logits(gather_rows(pseudo, rows)), torch.arange(num_offsets, device=rows.device).expand_as(rows)
