"""Two faults of vLLM 0.32.0's rejection sampler on a CPU, mended where FIRP drafts.

Its kernel that repeats a request's temperature and top-p for each draft converts them to integers and writes to a copy,
so that samples are drawn with whatever memory holds. And top-k raises in a step without drafts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def mend() -> None:
    """Replace both functions in this process."""
    from vllm.v1.sample import rejection_sampler

    if hasattr(rejection_sampler.apply_sampling_constraints, "firp"):
        return
    original = rejection_sampler.apply_sampling_constraints

    def apply_sampling_constraints(logits: Tensor, *args: Any) -> Tensor:
        return original(logits, *args) if len(logits) else logits

    apply_sampling_constraints.firp = True  # type: ignore[attr-defined]
    rejection_sampler.apply_sampling_constraints = apply_sampling_constraints
    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens


def expand_batch_to_tokens(
    x: Tensor, cu_num_tokens: Tensor, num_tokens: int, replace_from: float = 0, replace_to: float = 0
) -> Tensor:
    """Values [B] of requests to [num_tokens], each as often as its request has tokens.

    Args:
        cu_num_tokens: [B] running sums of the tokens of each request.
        replace_from, replace_to: a value, and what stands for it.
    """
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    expanded = x.repeat_interleave(counts.long(), output_size=num_tokens)
    return torch.where(expanded == replace_from, replace_to, expanded).to(x.dtype)
