"""The context of a token transition: what it knows beside the token before.

A pseudo row is computed before the token after its node is known. When a tree is drafted from it, that token is known,
and so is the row's final state. Together they update the state before the head scores it, and with the token before a
candidate they shift the factor of the transition:

    known[j]  = inputs[j] @ (unit(state[j]), unit(embedding of the first token)) + bias[j]
    state'[j] = state[j] + rms(state[j]) * updates[j] @ silu(known[j])
    query     = source[parent] + outputs @ silu(known[j] + parents @ unit(embedding of the parent))
    p'(x)     proportional to p(x) * exp(query . target[x]), over the candidates of the row

p and the candidates are the head's of state'. The first token is the one that follows the lookahead node, the parent is
the candidate's own. Zeros in `updates` and `outputs` change nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional

from firp.decoder.view import DecoderView

EPSILON = 1e-6


def unit(rows: Tensor) -> Tensor:
    """Rows [..., d] scaled to a mean square of 1."""
    return functional.rms_norm(rows, rows.shape[-1:], eps=EPSILON)


@dataclass(frozen=True)
class Context:
    """Weights of a context, of one dtype, on one device.

    Attributes:
        inputs: [k, w, 2 d] maps of the state and of the first token's embedding, side by side.
        bias: [k, w].
        parents: [w, d] map of the parent's embedding.
        outputs: [r, w].
        updates: [k, d, w] of the states.
        linear: the function that multiplies rows [..., a] by a weight [b, a].
    """

    inputs: Tensor
    bias: Tensor
    parents: Tensor
    outputs: Tensor
    updates: Tensor
    linear: Callable[[Tensor, Tensor], Tensor] = functional.linear

    def known(self, states: Tensor, first: Tensor) -> Tensor:
        """What does not depend on a candidate.

        Args:
            states: [n, k', d] final states of the pseudo rows of the first k' offsets, before the last norm.
            first: [n, d] embeddings of the token after each anchor.

        Returns:
            [n, k', w].
        """
        states, first = unit(states), unit(first)
        parts = []
        for j in range(states.shape[1]):
            parts.append(self.linear(torch.cat([states[:, j], first], 1), self.inputs[j]))
        return torch.stack(parts, 1) + self.bias[: states.shape[1]]

    def updated(self, states: Tensor, known: Tensor) -> Tensor:
        """The states [n, k', d] that the head scores, given their known [n, k', w]."""
        size = states.float().square().mean(-1, keepdim=True).add(EPSILON).sqrt().to(states.dtype)
        inner = functional.silu(known)
        parts = [self.linear(inner[:, j], self.updates[j]) for j in range(states.shape[1])]
        return states + size * torch.stack(parts, 1)

    def queries(self, known: Tensor, parents: Tensor) -> Tensor:
        """What is added to the source factors of parents with embeddings [..., m, d], given known [..., w].

        Returns:
            [..., m, r].
        """
        inner = known[..., None, :] + self.linear(unit(parents), self.parents)
        return self.linear(functional.silu(inner), self.outputs)


class Conditioner:
    """Marginals given the token before, by a transition that has a context.

    Args:
        view: of the base model.
        tables: of the transition (`firp.drafting.transition.token_tables`).
        context: its context, in the model's dtype.
        ops: from `firp_kernels.bind`.
    """

    def __init__(
        self, view: DecoderView, tables: tuple[Tensor, Tensor], context: Context, ops: SimpleNamespace
    ) -> None:
        self.view, self.context, self.ops = view, context, ops
        self.source, self.target = tables

    @torch.no_grad()
    def known(self, states: Tensor, first: Tensor) -> Tensor:
        """`Context.known` of states [n, k', d] and the tokens [n] after their anchors."""
        return self.context.known(states, self.view.embed(first))

    @torch.no_grad()
    def updated(self, states: Tensor, known: Tensor) -> Tensor:
        """`Context.updated`."""
        return self.context.updated(states, known)

    @torch.no_grad()
    def __call__(self, probabilities: Tensor, candidates: Tensor, known: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
        """As `firp_kernels.condition_marginals`, with all ranks.

        Args:
            probabilities, candidates: [n, k', K].
            known: [n, k', w].
            root: [n] int64 the token before the first depth's.

        Returns:
            probabilities and order [n, k', K, K]; row c of a depth follows candidate c of the depth above.
        """
        count, depths, ranks = candidates.shape
        parents = torch.cat([root[:, None], candidates[:, :-1].flatten(1)], 1)  # [n, 1 + (k' - 1) K]
        known = torch.cat([known[:, :1], known[:, 1:].repeat_interleave(ranks, 1)], 1)
        query = self.context.queries(known, self.view.embed(parents)[:, :, None])[:, :, 0]
        query = query + self.source[parents]  # [n, 1 + (k' - 1) K, r]
        # The op reads factors by token: here each parent and each candidate is a token of its own.
        rows = torch.cat([query, query.new_zeros(count, ranks, query.shape[2])], 1).flatten(0, 1)
        target = torch.cat([self.target[root][:, None], self.target[candidates].flatten(1, 2)], 1).flatten(0, 1)
        places = torch.arange(len(rows), device=root.device).view(count, 1 + depths * ranks)
        return self.ops.condition_marginals(
            probabilities, places[:, 1:].reshape(candidates.shape), places[:, 0].contiguous(), rows, target, ranks
        )
