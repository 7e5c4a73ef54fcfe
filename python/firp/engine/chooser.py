"""How a step turns the model's scores into tokens: the protocol, and greedy decoding."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Protocol

from torch import Tensor

from firp.engine.state import DecodeState
from firp_kernels import Verified


class Chooser(Protocol):
    """Turns one step's scores into tokens.

    Attributes:
        on_device: needs nothing from the host during a step, so the step may be captured and read late.
        key: two choosers of one key choose alike, with any seeds.
        one_by_one: sees one token at a time, so that a batch decodes plainly and its size stays.
        seed: of sampling, which `firp.generation.loop` puts into the state; None takes the argmax.
    """

    @property
    def on_device(self) -> bool: ...

    @property
    def key(self) -> tuple: ...

    @property
    def one_by_one(self) -> bool: ...

    @property
    def seed(self) -> int | None: ...

    def __call__(self, logits: Tensor, state: DecodeState, max_depth: int) -> tuple[Verified, Tensor | None]:
        """Choose along the tree.

        Args:
            logits: [B, N, V] the model's own.
            state: before the step's commit.
            max_depth: the deepest walk.

        Returns:
            What `verify_tree` returns, and the scores [B, N, V] that were chosen from (None: delivered already).
        """


class Greedy:
    """The argmax of the model's own scores."""

    on_device = True
    one_by_one = False
    key = ("greedy",)
    seed = None

    def __init__(self, ops: SimpleNamespace) -> None:
        self.ops = ops

    def __call__(self, logits: Tensor, state: DecodeState, max_depth: int) -> tuple[Verified, Tensor]:
        tree = state.tree
        return self.ops.verify_tree(logits, None, tree.tokens, tree.parents, tree.lookahead, max_depth), logits
