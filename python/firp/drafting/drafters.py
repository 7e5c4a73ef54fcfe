"""What drafts for one model: the predictor's maps and tables on its device, and a drafter for each batch size."""

from __future__ import annotations

from types import SimpleNamespace

from firp.decoder.view import DecoderView
from firp.drafting.predictor import FirpPredictor
from firp.drafting.refined import RefinedMarginals
from firp.drafting.transition import token_tables
from firp.drafting.trees import Drafter, TreeConfig


class Drafters:
    """A predictor's part of an engine.

    Args:
        view, ops: of the model.
        predictor: made for that model.
        tree: size and kind of the draft tree.
        shrinks: whether the tree shrinks as the batch grows; one that was asked for is the same for every batch size.

    Attributes:
        num_offsets: k.
        insertion_layer: t.
        weight: [k, d, d] in the model's dtype, on its device.
        transition: tables of the token transition, or None.
        refined: marginals by the predictor's refiner, or None.
        max_rows: rows of one sequence in a step at most, N + P * k.
    """

    def __init__(
        self, view: DecoderView, ops: SimpleNamespace, predictor: FirpPredictor, tree: TreeConfig, shrinks: bool
    ) -> None:
        self.ops = ops
        self.tree = tree
        self.shrinks = shrinks
        self.num_offsets = predictor.num_offsets
        self.insertion_layer = predictor.insertion_layer
        self.weight = predictor.weight.detach().to(view.device, view.dtype)
        self.transition = token_tables(view, predictor.transition)
        self.refined = RefinedMarginals(view, predictor, ops) if predictor.refiner_width else None
        self.max_rows = tree.num_nodes + tree.num_lookahead * predictor.num_offsets
        self._by_batch: dict[int, Drafter | None] = {}

    def for_batch(self, batch_size: int) -> Drafter | None:
        """What drafts for a batch of this size; None where it decodes plainly."""
        if batch_size not in self._by_batch:
            tree = self.tree.for_batch(batch_size) if self.shrinks else self.tree
            plain = tree.num_nodes == 1
            factors = self.transition, self.refined is not None
            self._by_batch[batch_size] = None if plain else Drafter(tree, self.num_offsets, self.ops, *factors)
        return self._by_batch[batch_size]
