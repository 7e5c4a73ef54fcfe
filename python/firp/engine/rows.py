"""Which rows a step holds: positions of node and pseudo rows, and whether they pass the head together."""

from __future__ import annotations

import torch
from torch import Tensor

from firp.drafting.trees import DraftTree
from firp.engine.state import gather_rows

# Pseudo rows of a sequence that share the head's pass with the node rows: reading the head twice costs more. On a GPU
# all
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
