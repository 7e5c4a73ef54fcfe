"""Penalties that Hugging Face has no processor for."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessor


class FrequencyPenalty(LogitsProcessor):
    """Lowers the score of a token by how often it occurred so far, in prompt and output.

    score -= frequency * occurrences + presence * (occurrences > 0). For `logits_processor=[...]`, here or in
    Hugging Face's own `generate`; it runs on all nodes of a tree at once.

    Args:
        frequency: taken off per occurrence; negative values favour repetition.
        presence: taken off once for a token that occurred at all.

    Raises:
        ValueError: a value that is no finite number.
    """

    def __init__(self, frequency: float = 0.0, presence: float = 0.0) -> None:
        for name, value in (("frequency", frequency), ("presence", presence)):
            if not isinstance(value, (int, float)) or not abs(value) < float("inf"):
                raise ValueError(f"{name}: got {value!r}, expected a finite number")
        self.frequency = frequency
        self.presence = presence

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] after tokens [B, T], of which those past V are not counted."""
        vocab = scores.shape[1]
        counts = torch.zeros(len(scores), vocab + 1, dtype=scores.dtype, device=scores.device)
        counts.scatter_add_(1, input_ids.clamp(max=vocab), torch.ones_like(input_ids, dtype=scores.dtype))
        counts = counts[:, :vocab]
        return scores - self.frequency * counts - self.presence * (counts > 0)
