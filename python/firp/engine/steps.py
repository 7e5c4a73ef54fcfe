"""The steps of one engine, by the number of offsets they draft with; it knows nothing of the engine."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace

from torch import Tensor

from firp.decoder.view import DecoderView
from firp.drafting.drafters import Drafters
from firp.drafting.predictor import FirpPredictor
from firp.engine.layers import LayerFunction, fused
from firp.engine.rows import fuse_beside_layers
from firp.engine.step import Step
from firp_kernels.ops.update_states import updated


class Steps:
    """Makes each step once.

    Args:
        view, ops, layer, prefill_attention: as `Step` takes them.
        predictor: what drafts; None decodes plainly.
        head: as `firp.Engine` takes it.
    """

    def __init__(
        self,
        view: DecoderView,
        ops: SimpleNamespace,
        layer: LayerFunction,
        prefill_attention: Callable[..., Tensor] | None,
        predictor: FirpPredictor | None,
        head: str | None,
    ) -> None:
        self.view, self.ops, self.layer, self.prefill_attention = view, ops, layer, prefill_attention
        self.predictor, self.head = predictor, head
        self.row_rotary = fuse_beside_layers(view, layer.compiled)
        self._made: dict[tuple, Step] = {}

    @functools.cached_property
    def plain(self) -> Step:
        """The step that drafts nothing."""
        return self._step(None, None)

    @functools.cached_property
    def _update(self) -> Callable[..., Tensor] | None:
        """The update of final states as few kernels, where layers are compiled."""
        return fused(updated) if self.layer.compiled else None

    def drafting(self, num_offsets: int, max_rows: int, head: str | None = None) -> Step:
        """The step that drafts with the first k offsets.

        Args:
            max_rows: rows of a sequence at most, N + P * k.
            head: its mode where the engine was not asked for one.
        """
        if self.predictor is None:
            raise RuntimeError("steps: drafting without a predictor")
        key = num_offsets, max_rows, head
        if key not in self._made:
            drafters = Drafters(self.view, self.ops, self.predictor, num_offsets, max_rows, self._update)
            self._made[key] = self._step(drafters, head)
        return self._made[key]

    def _step(self, drafters: Drafters | None, head: str | None) -> Step:
        head = self.head or head
        return Step(self.view, self.ops, self.layer, self.row_rotary, drafters, head, self.prefill_attention)
