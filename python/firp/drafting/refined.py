"""Marginals that a tree is drafted from, by a predictor with a refiner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional

from firp.decoder.view import DecoderView
from firp.drafting.kept import kept
from firp.drafting.predictor import FirpPredictor
from firp.drafting.refiner import Refiner, unit


class DraftHead:
    """The model's norm and head over the tokens that may be drafted.

    Args:
        view: of the base model.
        tokens: [M] int64, ascending; None is all that have an embedding.
        linear: the function that multiplies rows [..., a] by a weight [b, a].
        rows: the head's weight [M, d] and bias [M] or None, where they were read before.
    """

    def __init__(
        self,
        view: DecoderView,
        tokens: Tensor | None,
        linear: Callable[[Tensor, Tensor], Tensor] = functional.linear,
        rows: tuple[Tensor, Tensor | None] | None = None,
    ) -> None:
        self.view, self.linear = view, linear
        self.tokens = None if tokens is None else tokens.to(view.device)
        self.weight, self.bias = (None, None)
        if self.tokens is not None:
            self.weight, self.bias = rows or view.head_rows(self.tokens)
        self.num_embeddings = view.decoder.embed_tokens.weight.shape[0]

    def __call__(self, hidden: Tensor) -> Tensor:
        """Hidden rows [..., d] after the last layer to scores [..., M]."""
        if self.weight is not None:
            scores = self.linear(self.view.norm(hidden), self.weight)
            return self.view.scaled(scores if self.bias is None else scores + self.bias)
        scores = self.view.logits(hidden)
        # A padded head scores tokens that could not be drafted.
        return scores if scores.shape[-1] <= self.num_embeddings else scores[..., : self.num_embeddings].contiguous()

    def tokens_at(self, places: Tensor) -> Tensor:
        """Token ids at places among the M."""
        return places if self.tokens is None else self.tokens[places]

    def places_of(self, tokens: Tensor) -> Tensor:
        """Places of token ids among the M; M for one that is not there."""
        if self.tokens is None:
            return tokens
        places = torch.searchsorted(self.tokens, tokens).clamp(max=len(self.tokens) - 1)
        return places.where(self.tokens[places] == tokens, len(self.tokens))

    def among(self, scores: Tensor) -> Tensor:
        """Of the model's own scores [..., V] those of the M tokens."""
        return scores if self.tokens is None else scores[..., self.tokens]


def _weights_of(view: DecoderView, predictor: FirpPredictor) -> tuple[Refiner, Tensor | None, tuple | None]:
    """The refiner in the model's dtype, the tokens that are drafted, and the head's rows for them."""
    tokens = predictor.draft_tokens
    if tokens is not None:
        tokens = tokens.to(view.device)
    return predictor.refiner(view.device, view.dtype), tokens, None if tokens is None else view.head_rows(tokens)


class RefinedMarginals:
    """Pseudo states and the token that is known to marginals given the token before, as `draft_tree` takes them.

    Args:
        view: of the base model.
        predictor: with a refiner, and k offsets.
        ops: from `firp_kernels.bind`.
    """

    def __init__(self, view: DecoderView, predictor: FirpPredictor, ops: SimpleNamespace) -> None:
        self.view, self.ops = view, ops
        output = view.model.get_output_embeddings()
        refiner, tokens, rows = kept(
            view.decoder.embed_tokens,
            "refiner",
            [*predictor.state_dict(keep_vars=True).values(), *output.parameters()],
            (view.dtype, view.device),
            lambda: _weights_of(view, predictor),
        )
        self.refiner = replace(refiner, linear=ops.linear)
        self.head = DraftHead(view, tokens, ops.linear, rows)

    @torch.no_grad()
    def __call__(self, states: Tensor, root: Tensor, num_ranks: int) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Candidates of each depth, and their probabilities given the candidate of the depth above.

        Args:
            states: [B, k, d] final states of the pseudo rows, the first for depth 1.
            root: [B] int64 the token that is known.
            num_ranks: K, candidates of a depth.

        Returns:
            probabilities [B, k, K] float32 and candidates [B, k, K] int64 given the root alone; and the pair that
            `condition_marginals` returns, [B, k, K, K] of which row c of a depth follows candidate c of the depth
            above.
        """
        known = unit(self.view.embed(root[:, None]))[:, 0]
        inner = self.refiner.inner(states, known)
        scores = self.head(self.refiner.marginal(states, inner))
        rows = torch.arange(states.shape[1], device=states.device).expand(states.shape[:2])
        probabilities, places = self.ops.top_marginals(scores, rows, min(num_ranks, scores.shape[-1]))
        candidates = self.head.tokens_at(places)
        return probabilities, candidates, self._conditioned(states, inner, probabilities, candidates)

    def _conditioned(
        self, states: Tensor, inner: Tensor, probabilities: Tensor, candidates: Tensor
    ) -> tuple[Tensor, Tensor]:
        parents = unit(self.view.embed(candidates[:, :-1]))  # [B, k - 1, K, d]
        parts = [probabilities[:, :1, None].expand(-1, -1, candidates.shape[2], -1)]
        for depth in range(1, states.shape[1]):
            row = states[:, depth, None], inner[:, depth, None]
            after = self.refiner.updated(depth, *row, parents[:, depth - 1])  # [B, K, d]
            scores = self.view.scores_of(after, candidates[:, depth])  # [B, K, K]
            share = torch.softmax(scores, -1).nan_to_num(nan=0.0)
            parts.append((share * probabilities[:, depth].sum(-1)[:, None, None])[:, None])
        after, order = torch.cat(parts, 1).sort(dim=-1, descending=True, stable=True)
        return after, order.to(torch.int32)
