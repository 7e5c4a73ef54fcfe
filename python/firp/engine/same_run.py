"""Whether every rank of a sharded model was asked for the same run, before any of them waits for another."""

from __future__ import annotations

from torch import Tensor

from firp.engine.steps import Steps
from firp.engine.tree_choice import TreeChoice


def check_same_run(steps: Steps, trees: TreeChoice | None, prompts: list[Tensor], asked: dict[str, object]) -> None:
    """Raise ValueError, on every rank, that names what one of them was asked for otherwise than rank 0.

    Args:
        steps, trees: of the engine.
        prompts: B token tensors.
        asked: further arguments, by name.
    """
    ranks = steps.view.ranks
    if ranks.size == 1:
        return
    drafts = None if trees is None else (trees.tree, trees.automatic is None, trees.predictor.fingerprint())
    told = {"input_ids": [prompt.tolist() for prompt in prompts], "predictor, tree": drafts, "head": steps.head}
    ranks.check_same(told | asked)
