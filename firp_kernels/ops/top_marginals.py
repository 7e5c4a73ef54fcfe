"""`firp::top_marginals`: the most probable tokens of some rows of scores."""

from __future__ import annotations

import torch
from torch import Tensor

from firp_kernels import checks, registry

SCHEMA = "(Tensor logits, Tensor rows, SymInt num_ranks) -> (Tensor probabilities, Tensor candidates)"


def top_marginals(logits: Tensor, rows: Tensor, num_ranks: int, impl: str | None = None) -> tuple[Tensor, Tensor]:
    """The most probable tokens of some rows of scores, from which `draft_tree` grows the next tree.

    Args:
        logits: [B, R, V] floats, any strides.
        rows: [B, k] int64, which of the R rows.
        num_ranks: K, 1..V.

    Returns:
        probabilities: [B, k, K] float32 softmax of the row, descending; 0 in a row with NaN or without a finite peak.
        candidates: [B, k, K] int64 their tokens. Among equals the extension and the Triton kernel put the lower token
            first, torch any. In a row of probability 0 these are any tokens.

    The Triton kernel finds up to 64 ranks of scores of at most 32 bits; more ranks and float64 are left to torch.

    Raises:
        ValueError, TypeError: a shape, dtype or device that disagrees; on a CPU also a row out of range.

    Example:
        >>> import torch, firp_kernels
        >>> logits = torch.tensor([[[0.0, 0.0, 0.0], [0.1, 0.2, 0.7]]]).log()
        >>> probabilities, candidates = firp_kernels.top_marginals(logits, torch.tensor([[1]]), 2)
        >>> probabilities.mul(10).round().tolist(), candidates.tolist()
        ([[[7.0, 2.0]]], [[[2, 1]]])
    """
    return registry.call("top_marginals", impl, logits, rows, num_ranks)


def fake(logits: Tensor, rows: Tensor, num_ranks: int) -> tuple[Tensor, Tensor]:
    shape = (*rows.shape, num_ranks)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int64)


def check(logits: Tensor, rows: Tensor, num_ranks: int) -> None:
    checks.same_device(logits=logits, rows=rows)
    checks.shape("logits", logits, None, None, None)
    batch, count, vocab = logits.shape
    checks.shape("rows", rows, batch, None)
    checks.dtype("logits", logits, *checks.FLOATS)
    checks.dtype("rows", rows, torch.int64)
    if not 1 <= num_ranks <= vocab:
        raise ValueError(f"num_ranks: got {num_ranks}, expected 1..{vocab}")
    checks.between("rows", rows, 0, count - 1)


def reference(logits: Tensor, rows: Tensor, num_ranks: int) -> tuple[Tensor, Tensor]:
    check(logits, rows, num_ranks)
    sequence = torch.arange(logits.shape[0], device=logits.device)[:, None]
    chosen = logits[sequence, rows].to(checks.computed_in(logits.dtype))  # [B, k, V]
    top = chosen.topk(num_ranks, dim=-1)
    probabilities = (top.values - chosen.logsumexp(-1, keepdim=True)).exp()
    return probabilities.nan_to_num(nan=0.0).float(), top.indices
