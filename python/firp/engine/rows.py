"""Which rows a step holds: positions of node and pseudo rows, and whether they pass the head together."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from firp.decoder.view import DecoderView
from firp.engine.layers import fused

# Pseudo rows of a sequence that share the head's pass with the node rows: reading the head twice costs more. On a GPU
# all rows of a step count, up to where their products take longer than reading the head.
SHARED_PSEUDO_ROWS = 16
SHARED_ROWS = 192
# Positions of a table of cosines and sines at least, and what a module may hold its frequencies and their scale as.
SMALLEST_TABLE = 512
HELD = (Tensor, float, int)

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


class RotaryTable:
    """`row_rotary` on a CPU: cosines and sines of all positions so far, made by the model's own module, read by rows.

    Two reads instead of a dozen small calls: between two passes over the layers each starts from cold caches.

    Args:
        rotary: whose frequencies do not follow the length of a sequence.
    """

    def __init__(self, rotary: nn.Module) -> None:
        self.rotary = rotary
        # What the tables were made of, and the tables [S, D]: one value, as several threads may share an engine.
        self._made: tuple[tuple, tuple[Tensor, Tensor]] = (), (torch.empty(0), torch.empty(0))

    def __call__(
        self, hidden: Tensor, depths: Tensor, lookahead: Tensor, context_lens: Tensor, num_offsets: int
    ) -> tuple[Tensor, Tensor]:
        positions: list[int] = []
        trees = zip(context_lens.tolist(), depths.tolist(), lookahead.tolist(), strict=True)
        for context, own_depths, slots in trees:
            nodes = [context + depth for depth in own_depths]
            positions += nodes
            positions += [nodes[max(slot, 0)] + offset for slot in slots for offset in range(1, num_offsets + 1)]
        tables, index = self._filled(hidden, max(positions, default=0)), torch.tensor(positions)
        cos, sin = (table.index_select(0, index).view(len(depths), -1, table.shape[1]) for table in tables)
        return cos, sin

    def _filled(self, hidden: Tensor, last: int) -> tuple[Tensor, Tensor]:
        """Tables [S, D] of positions up to the last one at least, made again where the module's values are others."""
        own = vars(self.rotary)
        held = (*own["_buffers"].values(), *own["_parameters"].values(), *own.values())
        values = [value.tolist() if isinstance(value, Tensor) else value for value in held if isinstance(value, HELD)]
        made_of = hidden.dtype, values
        before, tables = self._made
        if made_of != before or last >= len(tables[0]):
            cos, sin = self.rotary(hidden, torch.arange(max(SMALLEST_TABLE, 1 << last.bit_length()))[None])
            tables = cos[0], sin[0]
            self._made = made_of, tables
        return tables


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
    if view.device.type == "cpu" and not compiled:
        return RotaryTable(view.fixed_rotary)
    return functools.partial(fuse(row_rotary), view.fixed_rotary)


def few_rows(device: torch.device, batch_size: int, num_rows: int, num_nodes: int) -> bool:
    """Whether the N + P*k rows of each of B sequences, N of them nodes, are few enough to pass the head together."""
    if device.type == "cpu":
        return num_rows - num_nodes <= SHARED_PSEUDO_ROWS
    return batch_size * num_rows <= SHARED_ROWS
