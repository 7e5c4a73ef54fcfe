"""`firp::condition_marginals`: marginals conditioned on the previous token."""

from __future__ import annotations

import torch
from torch import Tensor

from firp_kernels import checks, registry

SCHEMA = (
    "(Tensor probabilities, Tensor candidates, Tensor root_token, Tensor source, Tensor target, SymInt num_ranks) "
    "-> (Tensor probabilities, Tensor order)"
)


def condition_marginals(
    probabilities: Tensor, candidates: Tensor, root_token: Tensor, source: Tensor, target: Tensor, num_ranks: int,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Marginals conditioned on the previous token, by a bigram factor of rank r, as `draft_tree` takes them.

    Row c of depth e > 1 follows candidate c of depth e - 1; every row of depth 1 follows the root token. In it p'(x) is
    proportional to p(x) * exp(source[previous] . target[x]) over the K candidates of the depth; their probabilities
    keep their sum. A row that has no finite sum gets probabilities 0.

    Args:
        probabilities: [B, k, K] float32, not negative; k and K at least 1. candidates: [B, k, K] int64 their tokens,
            0..V - 1.
        root_token: [B] int64, 0..V - 1.
        source, target: [V, r] floats of one dtype; products are summed in float32.
        num_ranks: candidates of a row to return, 1..K.

    Returns:
        probabilities: [B, k, K, num_ranks] float32, descending.
        order: [B, k, K, num_ranks] int32, which candidate of the depth has them; among equals the earlier comes first.

    Raises:
        ValueError, TypeError: a shape, dtype or device that disagrees; on a CPU also a token out of range.

    Example:
        >>> import torch, firp_kernels
        >>> probabilities, candidates = torch.tensor([[[0.5, 0.25]]]), torch.tensor([[[1, 2]]])
        >>> source, target = torch.ones(3, 1), torch.tensor([[0.0], [0.0], [90.0]])  # token 2 follows any token
        >>> root = torch.tensor([0])
        >>> after, order = firp_kernels.condition_marginals(probabilities, candidates, root, source, target, 1)
        >>> after.flatten().tolist(), order.flatten().tolist()
        ([0.75, 0.75], [1, 1])
    """
    return registry.call("condition_marginals", impl, probabilities, candidates, root_token, source, target, num_ranks)


def fake(
    probabilities: Tensor, candidates: Tensor, root_token: Tensor, source: Tensor, target: Tensor, num_ranks: int
) -> tuple[Tensor, Tensor]:
    shape = (*probabilities.shape, num_ranks)
    return probabilities.new_empty(shape), candidates.new_empty(shape, dtype=torch.int32)


def check(
    probabilities: Tensor, candidates: Tensor, root_token: Tensor, source: Tensor, target: Tensor, num_ranks: int
) -> None:
    checks.same_device(
        probabilities=probabilities, candidates=candidates, root_token=root_token, source=source, target=target
    )
    checks.shape("probabilities", probabilities, None, None, None)
    checks.some_marginals(probabilities)
    checks.shape("candidates", candidates, *probabilities.shape)
    checks.shape("root_token", root_token, probabilities.shape[0])
    checks.shape("source", source, None, None)
    checks.shape("target", target, *source.shape)
    checks.dtype("probabilities", probabilities, torch.float32)
    checks.dtype("candidates", candidates, torch.int64)
    checks.dtype("root_token", root_token, torch.int64)
    checks.dtype("source", source, *checks.FLOATS)
    checks.dtype("target", target, source.dtype)
    if not 1 <= num_ranks <= probabilities.shape[2]:
        raise ValueError(f"num_ranks: got {num_ranks}, expected 1..{probabilities.shape[2]}")
    checks.between("candidates", candidates, 0, len(source) - 1)
    checks.between("root_token", root_token, 0, len(source) - 1)


def reference(
    probabilities: Tensor, candidates: Tensor, root_token: Tensor, source: Tensor, target: Tensor, num_ranks: int
) -> tuple[Tensor, Tensor]:
    check(probabilities, candidates, root_token, source, target, num_ranks)
    root = root_token[:, None, None].expand(-1, 1, candidates.shape[2])
    previous = torch.cat([root, candidates[:, :-1]], 1)  # [B, k, K], the token before each row
    factor = source[previous].float() @ target[candidates].float().mT  # [B, k, K, K]
    before = probabilities[:, :, None]
    highest = factor.masked_fill(before == 0, float("-inf")).amax(-1, keepdim=True)
    weight = torch.where(before > 0, before * (factor - highest).exp(), 0.0)
    after = (weight / weight.sum(-1, keepdim=True) * before.sum(-1, keepdim=True)).nan_to_num(nan=0.0)
    after, order = after.sort(dim=-1, descending=True, stable=True)
    return after[..., :num_ranks].contiguous(), order[..., :num_ranks].to(torch.int32)
