"""Typical acceptance: a LOSSY option that keeps more drafts than exact sampling does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from firp.engine.state import DecodeState, gather_rows
from firp.sampling.choosers import Vectorised
from firp_kernels.bitmask import unpack_ancestors


@dataclass(frozen=True)
class TypicalAcceptance:
    """Accept a draft that the model finds probable enough, though it did not draw it. The output is NOT the model's own
    distribution: text is more probable than the model's samples.

    A draft x after a path with processed distribution p is accepted if p(x) > min(epsilon, delta * exp(-entropy(p))).
    The deepest accepted path is emitted, then one token drawn from the model after it.

    Attributes:
        epsilon: probability that always suffices, 0 < epsilon <= 1.
        delta: factor for distributions of high entropy, above 0.

    Raises:
        ValueError: a field out of range.

    Source: Medusa, arXiv 2401.10774, section 2.3.1.
    """

    epsilon: float = 0.09
    delta: float = 0.3

    def __post_init__(self) -> None:
        if not 0 < self.epsilon <= 1:
            raise ValueError(f"epsilon: got {self.epsilon}, expected above 0 and at most 1")
        if not self.delta > 0:
            raise ValueError(f"delta: got {self.delta}, expected above 0")


class Typical(Vectorised):
    """Forces the deepest path of acceptable drafts, then draws as exact sampling does.

    Args:
        rule: what is acceptable.
        others: as `Vectorised` takes them; `seed` must be a number.
    """

    def __init__(self, rule: TypicalAcceptance, *others: Any) -> None:
        super().__init__(*others)
        self.epsilon, self.delta = rule.epsilon, rule.delta

    def acceptable(self, before: Tensor, drafts: Tensor) -> Tensor:
        """[B, N] bool for drafts [B, N], each after the distribution `before` [B, N, V]."""
        chance = before.gather(-1, drafts[..., None])[..., 0]
        entropy = torch.special.entr(before).sum(-1)
        return chance > (self.delta * (-entropy).exp()).clamp(max=self.epsilon)

    def probabilities(self, scores: Tensor, state: DecodeState) -> Tensor:
        """[B, N, V]: the model's own, but certainty of the accepted child at every node that has one."""
        exact, tree = torch.softmax(scores, dim=-1), state.tree
        num_nodes = tree.tokens.shape[1]
        parents = tree.parents.long().clamp(min=0)
        before = gather_rows(exact, parents)
        is_root = torch.arange(num_nodes, device=scores.device) == 0
        acceptable = is_root | ((tree.parents >= 0) & self.acceptable(before, tree.tokens))
        lineage = unpack_ancestors(tree.ancestors, num_nodes)
        alive = (acceptable[:, None] | ~lineage).all(-1)
        deepest = torch.where(alive, tree.depths, -1).argmax(-1)
        on_path = lineage[torch.arange(len(deepest), device=scores.device), deepest] & ~is_root
        # Nodes off the path write into a last column that is dropped.
        forced = torch.full((len(deepest), num_nodes + 1), -1, device=scores.device, dtype=torch.long)
        forced.scatter_(1, torch.where(on_path, parents, num_nodes), tree.tokens)
        forced = forced[:, :num_nodes, None]
        certain = torch.zeros_like(exact).scatter_(-1, forced.clamp(min=0), 1.0)
        return torch.where(forced >= 0, certain, exact)
