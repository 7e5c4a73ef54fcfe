"""A low-rank bigram term: how likely a token is after the previous one, from the model's embeddings.

A pseudo row is computed before the tokens between its node and its position are chosen. When a tree is drafted they are
known, or drafted themselves: `firp_kernels.condition_marginals` then multiplies p(x) by exp(source[c] . target[x]),
where c is the token of x's parent. Both tables are linear in the embeddings, so rare tokens borrow from their
neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from firp.decoder.view import DecoderView

TOKENS_AT_ONCE = 8192


class UnitEmbeddings:
    """Token embeddings of a model, scaled to a mean square of 1 over the vocabulary."""

    @torch.no_grad()
    def __init__(self, view: DecoderView) -> None:
        self.view = view
        self.vocabulary = torch.arange(view.decoder.embed_tokens.weight.shape[0], device=view.device)
        squares = sum(view.embed(tokens).double().pow(2).sum() for tokens in self.vocabulary.split(TOKENS_AT_ONCE))
        self.scale = float((squares / (len(self.vocabulary) * view.config.hidden_size)).rsqrt())

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Tokens [...] to float32 [..., d]."""
        return self.view.embed(tokens).float() * self.scale


@torch.no_grad()
def token_tables(view: DecoderView, transition: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """The tables source and target [V, r], in the model's dtype, of a predictor's `transition` [2, d, r]; None has
    none.
    """
    if transition is None:
        return None
    embeddings, maps = UnitEmbeddings(view), transition.detach().to(view.device).float()
    parts = [(embeddings(tokens) @ maps).to(view.dtype) for tokens in embeddings.vocabulary.split(TOKENS_AT_ONCE)]
    source, target = torch.cat(parts, 1)
    return source, target
