"""A low-rank bigram term: how likely a token is after the previous one, from the model's embeddings.

A pseudo row is computed before the tokens between its node and its position are chosen. When a tree is drafted they are
known, or drafted themselves: `firp_kernels.condition_marginals` then multiplies p(x) by exp(source[c] . target[x]),
where c is the token of x's parent. Both tables are linear in the embeddings, so rare tokens borrow from their
neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from firp.decoder.modes import plain_tensors
from firp.decoder.view import DecoderView
from firp.drafting.kept import kept

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


def token_tables(view: DecoderView, transition: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """The tables source and target [V, r], in the model's dtype, of a predictor's `transition` [2, d, r]; None has
    none. They are made once for a model and a predictor.
    """
    if transition is None:
        return None
    module = view.decoder.embed_tokens
    tensors = (*module.parameters(), transition)
    return kept(module, "tables", tensors, (view.dtype, view.device), lambda: _tables_of(view, transition))


def _tables_of(view: DecoderView, transition: Tensor) -> tuple[Tensor, Tensor]:
    return make_tables(view.embed, view.decoder.embed_tokens.weight.shape[0], transition, view.dtype, view.device)


@plain_tensors
def make_tables(
    embed: Callable[[Tensor], Tensor],
    vocab_size: int,
    transition: Tensor,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """The tables source and target [V, r] of a transition [2, d, r], in one pass over the embeddings.

    `embed` takes tokens [n] to embeddings [n, d] on `device`; their scale comes out at the end of the pass.
    """
    maps = torch.cat(tuple(transition.detach().to(device).float()), 1)  # [d, 2 * r]
    vocabulary = torch.arange(vocab_size, device=device)
    parts, squares = [], torch.zeros((), dtype=torch.float64, device=device)
    for tokens in vocabulary.split(TOKENS_AT_ONCE):
        embeddings = embed(tokens).float()
        squares += torch.linalg.vector_norm(embeddings).double().square()
        parts.append(embeddings @ maps)
    scale = float((squares / (len(vocabulary) * maps.shape[0])).rsqrt())
    source, target = (torch.cat(parts) * scale).to(dtype).chunk(2, 1)
    return source.contiguous(), target.contiguous()


def condition(
    ops: SimpleNamespace,
    probabilities: Tensor,
    candidates: Tensor,
    root: Tensor,
    transition: tuple[Tensor, Tensor],
    ranks: int,
    knows_root: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`firp_kernels.condition_marginals`, which leaves depth 1 as it is where its marginals know the root [B]."""
    after, order = ops.condition_marginals(probabilities, candidates, root, *transition, ranks)
    if knows_root is None:
        return after, order
    as_it_is = knows_root[:, None, None]
    first = torch.where(as_it_is, probabilities[:, :1, :ranks], after[:, 0])
    places = torch.where(as_it_is, torch.arange(ranks, dtype=order.dtype, device=order.device), order[:, 0])
    return torch.cat([first[:, None], after[:, 1:]], 1), torch.cat([places[:, None], order[:, 1:]], 1)
