"""Decode with draft heads through this engine: its trees, verification, commit, graphs and loop.

A step holds the tree's nodes alone. The heads read the state of the last accepted node, whichever it is, so every node
counts as a lookahead node and no ancestor ever serves instead.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from firp.drafting.trees import Drafter, DraftTree, TreeConfig, first_tree
from firp.engine.engine import Engine
from firp.engine.layers import run_layers
from firp.engine.state import DecodeState, gather_rows
from firp.engine.step import Scored, Step
from firp.engine.steps import Steps
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.baselines.heads import Heads
from firp_kernels import Emitted


class HeadStep(Step):
    """A step without pseudo rows; drafts come from heads.

    Args:
        steps: of a plain engine.
        heads: for the model, in its dtype, on its device.
        max_rows: nodes of a tree at most.
    """

    def __init__(self, steps: Steps, heads: Heads, max_rows: int) -> None:
        super().__init__(
            steps.view, steps.ops, steps.layer, steps.row_rotary, None, "two-pass", steps.prefill_attention
        )
        self.heads = heads
        self.num_offsets = heads.num_offsets
        self.max_rows = max_rows

    def forward(self, state: DecodeState) -> Tensor:
        """Final hidden states of the nodes, then those that the heads read, [B, 2N, d]."""
        tree = replace(state.tree, lookahead=state.tree.lookahead[:, :0])
        hidden = self.view.embed(tree.tokens)
        position_embeddings = self.row_rotary(hidden, tree.depths, tree.lookahead, state.context_lens, 0)

        def layers(hidden: Tensor, start: int, stop: int) -> Tensor:
            return run_layers(
                self.layer, self.view.layers[start:stop], hidden, position_embeddings, state.cache[start:stop],
                state.context_lens, tree, 0,
            )  # fmt: skip

        source = layers(hidden, 0, self.heads.source_layer)
        return torch.cat([layers(source, self.heads.source_layer, self.view.num_layers), source], 1)

    def score(self, hidden: Tensor, tree: DraftTree) -> Scored:
        """Scores of the nodes; the states that the heads read are kept beside them."""
        num_nodes = tree.size[0]
        return Scored(self.view.logits(hidden[:, :num_nodes].contiguous()), None, hidden[:, num_nodes:])

    def draft(self, state: DecodeState, scored: Scored, emitted: Emitted) -> DraftTree:
        """Next tree, from the heads over the last accepted node."""
        drafter, tree = state.drafter, state.tree
        if drafter is None:
            return first_tree(emitted.root, None, self.layer.compiled)
        slot = emitted.rows[:, :1] // self.num_offsets  # rows count k for each lookahead slot
        node = tree.lookahead.long().gather(1, slot).clamp(min=0)
        scores = self.heads.scores(self.view, gather_rows(scored.hidden, node)[:, 0])  # [B, k, V]
        scores = scores[..., : self.num_embeddings].contiguous()
        rows = torch.arange(self.num_offsets, device=scores.device).expand(scores.shape[:2])
        probabilities, candidates = self.ops.top_marginals(scores, rows, min(drafter.num_ranks, scores.shape[-1]))
        return drafter.draft(probabilities, candidates, emitted.root, emitted.usable)


class HeadEngine(Engine):
    """An engine that drafts with heads.

    Args:
        model: as `firp.Engine` takes it.
        heads: for that model.
        num_nodes: N of the trees, root included, at every batch size.
        kind: of the trees, "dynamic" or "static".
        **options: of `firp.Engine`: impl, graphs, compile.

    Raises:
        ValueError: as `firp.Engine`; heads for another model; a tree out of range.
    """

    def __init__(
        self, model: PreTrainedModel, heads: Heads, num_nodes: int, kind: str = "dynamic", **options: Any
    ) -> None:
        tree = TreeConfig(num_nodes, num_nodes, kind)
        super().__init__(model, **options)
        heads.check_view(self.view)
        own = copy.deepcopy(heads).to(self.view.device, self.view.dtype).requires_grad_(False)
        self._head_step = HeadStep(self.steps, own, num_nodes)
        self._drafter = Drafter(tree, heads.num_offsets, self.ops) if num_nodes > 1 else None

    @property
    def _step(self) -> Step:
        return self._head_step

    def drafter(self, batch_size: int, tree: TreeConfig | None = None) -> Drafter | None:
        """What drafts, at every batch size; None where a tree is the root alone."""
        return self._drafter
