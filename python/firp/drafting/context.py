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

Linear = Callable[[Tensor, Tensor], Tensor]


def unit(rows: Tensor) -> Tensor:
    """Rows [..., d] scaled to a mean square of 1."""
    return functional.rms_norm(rows, rows.shape[-1:], eps=EPSILON)


def each(rows: Tensor, weights: Tensor, linear: Linear) -> Tensor:
    """Rows [n, k', a] of offsets by their own weights [k, b, a], [n, k', b]."""
    if linear is functional.linear:
        return torch.einsum("nka,kba->nkb", rows, weights[: rows.shape[1]])
    return torch.stack([linear(rows[:, j], weights[j]) for j in range(rows.shape[1])], 1)


def known_of(states: Tensor, first: Tensor, inputs: Tensor, bias: Tensor, linear: Linear) -> Tensor:
    """`Context.known`."""
    rows = torch.cat([unit(states), unit(first)[:, None].expand_as(states)], -1)
    return each(rows, inputs, linear) + bias[: states.shape[1]]


def updated_of(states: Tensor, known: Tensor, updates: Tensor, linear: Linear) -> Tensor:
    """`Context.updated`."""
    size = torch.linalg.vector_norm(states, dim=-1, keepdim=True, dtype=torch.promote_types(states.dtype, torch.float32))
    size = (size * states.shape[-1] ** -0.5).to(states.dtype)
    return states + size * each(functional.silu(known), updates, linear)


def queries_of(known: Tensor, parents: Tensor, weight: Tensor, outputs: Tensor, linear: Linear) -> Tensor:
    """`Context.queries`."""
    return linear(functional.silu(known[..., None, :] + linear(unit(parents), weight)), outputs)


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
    linear: Linear = functional.linear

    def known(self, states: Tensor, first: Tensor) -> Tensor:
        """What does not depend on a candidate.

        Args:
            states: [n, k', d] final states of the pseudo rows of the first k' offsets, before the last norm.
            first: [n, d] embeddings of the token after each anchor.

        Returns:
            [n, k', w].
        """
        return known_of(states, first, self.inputs, self.bias, self.linear)

    def updated(self, states: Tensor, known: Tensor) -> Tensor:
        """The states [n, k', d] that the head scores, given their known [n, k', w]."""
        return updated_of(states, known, self.updates, self.linear)

    def queries(self, known: Tensor, parents: Tensor) -> Tensor:
        """What is added to the source factors of parents with embeddings [..., m, d], given known [..., w].

        Returns:
            [..., m, r].
        """
        return queries_of(known, parents, self.parents, self.outputs, self.linear)


class Conditioner:
    """Marginals given the token before, by a transition that has a context.

    Args:
        view: of the base model.
        tables: of the transition (`firp.drafting.transition.token_tables`).
        context: its context, in the model's dtype.
        ops: from `firp_kernels.bind`.
        fuse: compiles a function of a few rows into few kernels; None runs them as they are.
    """

    def __init__(
        self,
        view: DecoderView,
        tables: tuple[Tensor, Tensor],
        context: Context,
        ops: SimpleNamespace,
        fuse: Callable[[Callable[..., Tensor]], Callable[..., Tensor]] | None = None,
    ) -> None:
        self.view, self.context, self.ops = view, context, ops
        self.source, self.target = tables
        self.linear = ops.linear if fuse is None else functional.linear
        functions = known_of, updated_of, queries_of
        self._known, self._updated, self._queries = functions if fuse is None else map(fuse, functions)

    @torch.no_grad()
    def known(self, states: Tensor, first: Tensor) -> Tensor:
        """`Context.known` of states [n, k', d] and the tokens [n] after their anchors."""
        return self._known(states, self.view.embed(first), self.context.inputs, self.context.bias, self.linear)

    @torch.no_grad()
    def updated(self, states: Tensor, known: Tensor) -> Tensor:
        """`Context.updated`."""
        return self._updated(states, known, self.context.updates, self.linear)

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
        context, embedded = self.context, self.view.embed(parents)[:, :, None]
        query = self._queries(known, embedded, context.parents, context.outputs, self.linear)[:, :, 0]
        query = query + self.source[parents]  # [n, 1 + (k' - 1) K, r]
        # The op reads factors by token: here each parent and each candidate is a token of its own.
        rows = torch.cat([query, query.new_zeros(count, ranks, query.shape[2])], 1).flatten(0, 1)
        target = torch.cat([self.target[root][:, None], self.target[candidates].flatten(1, 2)], 1).flatten(0, 1)
        places = torch.arange(len(rows), device=root.device).view(count, 1 + depths * ranks)
        return self.ops.condition_marginals(
            probabilities, places[:, 1:].reshape(candidates.shape), places[:, 0].contiguous(), rows, target, ranks
        )
