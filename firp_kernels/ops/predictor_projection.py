"""`firp::predictor_projection`: the pseudo rows at the insertion layer."""

from __future__ import annotations

import torch
from torch import Tensor

from firp_kernels import checks, registry

SCHEMA = "(Tensor hidden, Tensor weight, Tensor lookahead) -> Tensor"


def predictor_projection(hidden: Tensor, weight: Tensor, lookahead: Tensor, impl: str | None = None) -> Tensor:
    """Append the pseudo rows of the lookahead nodes: pseudo[p, j] = weight[j] @ hidden[lookahead[p]].

    Args:
        hidden: [B, N, d] node rows at the insertion layer.
        weight: [k, d, d], output dimension first, dtype of hidden.
        lookahead: [B, P] int32; the rows of an empty slot (-1) are zero.

    Returns:
        [B, N + P*k, d]: the node rows unchanged, then the pseudo rows slot by slot.

    Raises:
        ValueError, TypeError: a shape, dtype or device that disagrees; on a CPU also a node out of range.

    Source: FIRP (arXiv 2410.20488), section 3.

    Example:
        >>> import torch, firp_kernels
        >>> hidden, weight = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[10.0]], [[100.0]]])
        >>> lookahead = torch.tensor([[1, -1]], dtype=torch.int32)
        >>> firp_kernels.predictor_projection(hidden, weight, lookahead).flatten().tolist()
        [1.0, 2.0, 20.0, 200.0, 0.0, 0.0]
    """
    return registry.call("predictor_projection", impl, hidden, weight, lookahead)


def fake(hidden: Tensor, weight: Tensor, lookahead: Tensor) -> Tensor:
    batch, num_nodes, width = hidden.shape
    return hidden.new_empty(batch, num_nodes + lookahead.shape[1] * weight.shape[0], width)


def check(hidden: Tensor, weight: Tensor, lookahead: Tensor) -> None:
    checks.same_device(hidden=hidden, weight=weight, lookahead=lookahead)
    checks.shape("hidden", hidden, None, None, None)
    batch, num_nodes, width = hidden.shape
    checks.shape("weight", weight, None, width, width)
    checks.shape("lookahead", lookahead, batch, None)
    checks.dtype("hidden", hidden, *checks.FLOATS)
    checks.dtype("weight", weight, hidden.dtype)
    checks.dtype("lookahead", lookahead, torch.int32)
    checks.between("lookahead", lookahead, -1, num_nodes - 1)


def reference(hidden: Tensor, weight: Tensor, lookahead: Tensor) -> Tensor:
    check(hidden, weight, lookahead)
    index = lookahead.long().clamp(min=0)[..., None].expand(-1, -1, hidden.shape[-1])
    source = hidden.gather(1, index)  # [B, P, d]
    pseudo = torch.einsum("kod,bpd->bpko", weight, source)
    pseudo = pseudo.masked_fill((lookahead < 0)[..., None, None], 0)
    return torch.cat([hidden, pseudo.flatten(1, 2)], dim=1)
