"""The update: final states of pseudo rows, once the token after their anchor is known, and the head that scores them.

A pseudo row is computed before the token after its node is known. When a tree is drafted from it, that token is known:

    inner[j]  = inputs[j] @ (unit(state[j]), unit(embedding of the first token)) + bias[j]
    state'[j] = state[j] + rms(state[j]) * outputs[j] @ silu(inner[j])

The first token is the one that follows the lookahead node. Zeros in `outputs` change nothing. Updated rows pass the
head after the nodes were verified, so there are k of them, and they may be scored for the most frequent tokens alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from firp.decoder.view import DecoderView
from firp.drafting.kept import kept
from firp.drafting.predictor import FirpPredictor
from firp_kernels.ops.update_states import updated

# What the op has a kernel for; elsewhere torch runs the formula.
KERNEL_DTYPES = (torch.bfloat16, torch.float32)

Linear = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class DraftHead:
    """The model's norm and head over the tokens that may be drafted.

    Attributes:
        view: of the base model.
        tokens: [M] int64 that are drafted, ascending; None: all.
        weight, bias: of these, [M, d] and [M] or None; None where the whole head scores them.
        linear: the function that multiplies rows [..., a] by a weight [b, a].
    """

    view: DecoderView
    tokens: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    linear: Linear

    @classmethod
    def of(cls, view: DecoderView, tokens: Tensor | None, linear: Linear) -> DraftHead:
        """A head of the listed tokens alone, where the model's is a plain linear; else the whole."""
        head = view.model.get_output_embeddings()
        if tokens is None or type(head) is not torch.nn.Linear or type(head.weight) is not torch.nn.Parameter:
            return cls(view, None, None, None, linear)
        tensors = [head.weight, tokens] if head.bias is None else [head.weight, head.bias, tokens]
        settings = (view.dtype, view.device)

        def rows() -> tuple[Tensor, Tensor, Tensor | None]:
            listed = tokens.to(view.device, copy=True)
            return listed, head.weight.detach()[listed], None if head.bias is None else head.bias.detach()[listed]

        return cls(view, *kept(head, "draft head", tensors, settings, rows), linear)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Rows [..., d] after the last layer to scores [..., M]."""
        if self.weight is None:
            return self.view.logits(hidden)
        scores = self.linear(self.view.norm(hidden), self.weight)
        return self.view.scaled(scores if self.bias is None else scores + self.bias)

    def tokens_at(self, places: Tensor) -> Tensor:
        """Token ids at places among the M."""
        return places if self.tokens is None else self.tokens[places]


class Updater:
    """What an engine makes of pseudo rows by a predictor's update.

    Args:
        view: of the base model.
        predictor: that has an update. num_offsets: its first k alone.
        ops: from `firp_kernels.bind`.
        update: runs the formula; None: the op, where it has a kernel for the dtype.
    """

    def __init__(
        self,
        view: DecoderView,
        predictor: FirpPredictor,
        num_offsets: int,
        ops: SimpleNamespace,
        update: Callable[..., Tensor] | None = None,
    ) -> None:
        self.view = view
        settings = (view.dtype, view.device)
        tensors = kept(
            view.decoder.embed_tokens, "update", predictor.update_tensors, settings,
            lambda: predictor.update_weights(view.device, view.dtype),
        )  # fmt: skip
        self.weights = tuple(tensor[:num_offsets] for tensor in tensors)
        self.head = DraftHead.of(view, predictor.draft_tokens, ops.linear)
        self._updated = update or (ops.update_states if view.dtype in KERNEL_DTYPES else updated)

    @torch.no_grad()
    def scores(self, states: Tensor, first: Tensor) -> Tensor:
        """Scores [n, k, M] of states [n, k, d], given the tokens [n] after their anchors."""
        return self.head(self._updated(states, self.view.embed(first), *self.weights))
