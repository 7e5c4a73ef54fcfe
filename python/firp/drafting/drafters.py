"""What drafts for one model: the predictor's maps and tables on its device, and a drafter for each tree."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

from torch import Tensor

from firp.decoder.view import DecoderView
from firp.drafting.choices import HEADS
from firp.drafting.kept import kept
from firp.drafting.predictor import FirpPredictor
from firp.drafting.transition import token_tables
from firp.drafting.trees import Drafter, TreeConfig
from firp.drafting.update import Updater


def check_drafting(predictor: object, tree: object) -> None:
    """Raise ValueError unless these are a predictor and a tree that it can draft, or nothing."""
    if predictor is not None and not isinstance(predictor, FirpPredictor):
        raise ValueError(
            f"predictor: got {type(predictor).__name__}, expected a FirpPredictor (firp.load_predictor reads one)"
        )
    if tree is not None and not isinstance(tree, TreeConfig):
        raise ValueError(f"tree: got {tree!r}, expected a firp.TreeConfig")
    if tree is not None and predictor is None:
        raise ValueError("tree: given without a predictor, expected None: there is nothing to draft with")


def check_head(head: str | None, predictor: FirpPredictor | None) -> None:
    """Raise ValueError unless it names a mode of the head that the predictor's rows can pass."""
    if head is not None and head not in HEADS:
        raise ValueError(f"head: got {head!r}, expected one of {', '.join(HEADS)}, or None")
    if head == "one-pass" and predictor is not None and predictor.update_width:
        raise ValueError(
            "head: got 'one-pass' with a predictor that updates pseudo rows before they are scored, expected "
            "'two-pass' or None"
        )


class Drafters:
    """A predictor's part of an engine.

    Args:
        view, ops: of the model.
        predictor: made for that model, of which the first `num_offsets` offsets draft.
        max_rows: rows of one sequence in a step at most, N + P * k.
        update: as `Updater` takes it.

    Attributes:
        num_offsets: k, at most the predictor's.
        insertion_layer: t.
        weight: [k, d, d] in the model's dtype, on its device.
        transition: tables of the token transition, or None.
        updater: of the final states of pseudo rows, or None.
    """

    def __init__(
        self,
        view: DecoderView,
        ops: SimpleNamespace,
        predictor: FirpPredictor,
        num_offsets: int,
        max_rows: int,
        update: Callable[..., Tensor] | None = None,
    ) -> None:
        self.ops = ops
        self.max_rows = max_rows
        self.num_offsets = num_offsets
        self.insertion_layer = predictor.insertion_layer
        weight = predictor.weight.detach()
        module, settings = view.decoder.embed_tokens, (view.dtype, view.device)
        maps = kept(module, "maps", [predictor.weight], settings, lambda: weight.to(view.device, view.dtype))
        self.weight = maps[:num_offsets]
        self.updater = Updater(view, predictor, num_offsets, ops, update) if predictor.update_width else None
        # An updated row of offset 1 knows the token before: with one offset nothing is left for the transition.
        knows_all = self.updater is not None and num_offsets == 1
        self.transition = None if knows_all else token_tables(view, predictor.transition)
        self._by_tree: dict[TreeConfig, Drafter] = {}

    def of(self, tree: TreeConfig) -> Drafter | None:
        """What drafts such trees; None for a tree of one node."""
        if tree.num_nodes == 1:
            return None
        if tree not in self._by_tree:
            self._by_tree[tree] = Drafter(tree, self.num_offsets, self.ops, self.transition)
        return self._by_tree[tree]
