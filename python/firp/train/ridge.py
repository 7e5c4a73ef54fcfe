"""Closed-form start: ridge regression from h[i] to h[i + j] at the insertion layer."""

from __future__ import annotations

import torch
from torch import Tensor

from firp.decoder.passes import RecordingAttention
from firp.decoder.view import DecoderView
from firp.train.data import Batch

SINK_POSITIONS = 4


class RidgeAccumulator:
    """Normal equations of k linear maps, gathered batch by batch in float64.

    The first `SINK_POSITIONS` positions are attention sinks with huge norms and are left out.

    Args:
        num_offsets: k.
        hidden_size: d.
        source_size: s of the rows that the maps read; default d.
    """

    def __init__(
        self, num_offsets: int, hidden_size: int, device: torch.device, source_size: int | None = None
    ) -> None:
        size = hidden_size if source_size is None else source_size
        self.covariance = torch.zeros(size, size, dtype=torch.float64, device=device)
        self.cross = torch.zeros(num_offsets, hidden_size, size, dtype=torch.float64, device=device)
        self.count = 0

    @torch.no_grad()
    def add(self, hidden: Tensor, lengths: Tensor, targets: Tensor | None = None) -> None:
        """Add hidden states [B, T, s], of which the first `lengths` [B] rows of each sequence are real.

        `targets` [B, T, d] are the rows that the maps shall give at later positions; None: the hidden states.
        """
        k = len(self.cross)
        for rows, aims, length in zip(hidden, hidden if targets is None else targets, lengths.tolist(), strict=True):
            rows, aims = (part[SINK_POSITIONS:length].float() for part in (rows, aims))
            if len(rows) <= k:
                continue
            source = rows[:-k]
            self.covariance += (source.T @ source).double()
            for j in range(k):
                target = aims[j + 1 : len(rows) - k + j + 1]
                self.cross[j] += (target.T @ source).double()
            self.count += len(source)

    def usable(self, lengths: Tensor) -> int:
        """Positions that `add` counts in sequences of `lengths` [B]."""
        rows, k = lengths - SINK_POSITIONS, len(self.cross)
        return int((rows - k)[rows > k].sum())

    def solve(self, strength: float = 1e-3) -> Tensor:
        """Return weight [k, d, s] in float32; the penalty is `strength` times the mean variance."""
        if self.count == 0:
            raise ValueError("data: no sequence is long enough for the ridge start")
        size = len(self.covariance)
        penalty = (
            strength
            * self.covariance.diagonal().mean()
            * torch.eye(size, dtype=torch.float64, device=self.covariance.device)
        )
        return torch.linalg.solve(self.covariance + penalty, self.cross.transpose(1, 2)).transpose(1, 2).float()


@torch.no_grad()
def hidden_at_insertion(view: DecoderView, batch: Batch, insertion_layer: int) -> Tensor:
    """Hidden states [B, T, d] after `insertion_layer` layers."""
    step = RecordingAttention(record_from=view.num_layers)
    position_ids = torch.arange(batch.tokens.shape[1], device=batch.tokens.device).expand(batch.tokens.shape)
    embedded = view.embed(batch.tokens)
    return view.run_layers(embedded, view.rotary(embedded, position_ids), step, 0, insertion_layer)
