"""What heads draft at every position of an answer, so that drafting can be replayed for any tree without the model."""

from __future__ import annotations

import torch
from firp.decoder.passes import real_rows
from firp.decoder.view import DecoderView
from firp.drafting.recording import Recording
from torch import Tensor

from benchmarks.baselines.heads import Heads
from firp_kernels import top_marginals

POSITIONS_AT_ONCE = 64


@torch.no_grad()
def record_heads(view: DecoderView, heads: Heads, prompt: Tensor, answer: list[int], num_ranks: int) -> Recording:
    """As `firp.drafting.recording.record`, with heads instead of a predictor."""
    tokens = torch.cat([prompt, torch.tensor(answer)])
    heads = heads.to(view.device)
    states = real_rows(view, tokens[None, :-1].to(view.device), heads.source_layer).inserted[0]
    parts = []
    for rows in states[len(prompt) - 1 :].split(POSITIONS_AT_ONCE):
        scores = heads.scores(view, rows).contiguous()
        offsets = torch.arange(scores.shape[1], device=scores.device).expand(scores.shape[:2])
        parts.append(top_marginals(scores, offsets, min(num_ranks, scores.shape[-1])))
    probabilities, candidates = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    return Recording(tokens[len(prompt) - 1 :], probabilities, candidates)
