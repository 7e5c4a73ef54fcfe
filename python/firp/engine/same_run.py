"""Whether every rank of a sharded model was asked for the same run, before any of them waits for another."""

from __future__ import annotations

from torch import Tensor

from firp.decoder.view import DecoderView
from firp.engine.tree_choice import TreeChoice


def check_same_run(view: DecoderView, trees: TreeChoice | None, prompts: list[Tensor], **others: object) -> None:
    """Raise ValueError, on every rank, that names what one of them was asked for otherwise than rank 0.

    Args:
        trees: of the engine. prompts: B token tensors. others: further arguments, by name.
    """
    if view.ranks.size == 1:
        return
    drafts = None if trees is None else (trees.tree, trees.automatic is None, trees.predictor.fingerprint())
    view.ranks.check_same({"input_ids": [prompt.tolist() for prompt in prompts], "predictor, tree": drafts} | others)
