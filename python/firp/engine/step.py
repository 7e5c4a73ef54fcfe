"""One step of decoding: verify a draft tree, commit and emit what was accepted, draft the next tree."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from firp.decoder.view import DecoderView
from firp.drafting.drafters import Drafters
from firp.drafting.lookup import LEAST_MATCH, MOST_BRANCH, MOST_MATCH, host_adds_branches, making_way
from firp.drafting.trees import MAX_NODES, DraftTree, first_tree
from firp.drafting.update import Updater
from firp.engine.chooser import Chooser
from firp.engine.layers import LayerFunction, run_layers
from firp.engine.rows import few_rows
from firp.engine.state import DecodeState, StepRecord, gather_rows
from firp_kernels import Emitted, Verified


class Scored(NamedTuple):
    """Rows of a step after the head.

    Attributes:
        nodes: [B, N, V] scores of the node rows.
        pseudo: [B, P*k, V] scores of the pseudo rows; None where the accepted node's rows alone are scored, later.
        hidden: [B, P*k, d] final hidden states of the pseudo rows.
    """

    nodes: Tensor
    pseudo: Tensor | None
    hidden: Tensor


class Step:
    """Device work in static shapes, which a graph may capture where the chooser is `on_device`.

    Args:
        view: of the model.
        ops: from `firp_kernels.bind`.
        layer: takes rows through one layer.
        row_rotary: from `firp.engine.rows.fuse_beside_layers`.
        drafters: what drafts; None decodes plainly.
        head: as `firp.Engine` takes it.
        prefill_attention: the op that prompts attend with (`firp.engine.prefill.PrefillAttention`), or None.
    """

    def __init__(
        self,
        view: DecoderView,
        ops: SimpleNamespace,
        layer: LayerFunction,
        row_rotary: Callable[..., tuple[Tensor, Tensor]],
        drafters: Drafters | None,
        head: str | None,
        prefill_attention: Callable[..., Tensor] | None,
    ) -> None:
        self.view = view
        self.ops = ops
        self.layer = layer
        self.drafters = drafters
        self.head = head
        self.prefill_attention = prefill_attention
        self.num_offsets = drafters.num_offsets if drafters else 0
        self.max_rows = drafters.max_rows if drafters else 1
        self.row_rotary = row_rotary
        self.num_embeddings = view.decoder.embed_tokens.weight.shape[0]
        self.keeps_size = not host_adds_branches(view.device)

    def run(self, state: DecodeState, choose: Chooser) -> StepRecord:
        """Take one step; the state is changed in place. Shapes: `firp.engine.state`."""
        hidden = self.forward(state)  # [B, N + P*k, d]
        scored = self.score(hidden, state.tree)  # nodes [B, N, V]
        chosen, scores = choose(scored.nodes, state, self.max_depth(state))  # path [B, max_depth + 1]
        if self.view.ranks.size > 1:
            chosen = Verified(*self.view.ranks.agree(chosen))
        emitted = self.emit(state, chosen)  # tokens [B, max_depth + 1], cut at a stop token and at the limit
        self.ops.commit_cache(state.cache, state.context_lens, chosen.path, emitted.kept, state.finished)
        state.finished.copy_(emitted.finished)  # [B]
        state.tree = self.draft(state, scored, emitted)  # tokens [B, N]
        if state.history is not None and self.keeps_size:
            self._look_up(state, emitted.tokens, emitted.counts, making_way(state.tree.size[0]), keeps_size=True)
        return StepRecord.of(emitted, chosen, scored.nodes, scores, state.keeps_scores)

    def forward(self, state: DecodeState) -> Tensor:
        """Final hidden states of the node rows, then of the pseudo rows, [B, N + P*k, d]."""
        tree, view, drafters = state.tree, self.view, self.drafters
        num_nodes, num_lookahead = tree.size
        hidden = view.embed(tree.tokens)  # [B, N, d]
        cos, sin = self.row_rotary(hidden, tree.depths, tree.lookahead, state.context_lens, self.num_offsets)

        def layers(hidden: Tensor, position_embeddings: tuple[Tensor, Tensor], start: int, stop: int) -> Tensor:
            return run_layers(
                self.layer, view.layers[start:stop], hidden, position_embeddings, state.cache[start:stop],
                state.context_lens, tree, self.num_offsets,
            )  # fmt: skip

        if drafters is None or not num_lookahead:
            return layers(hidden, (cos, sin), 0, view.num_layers)
        below = drafters.insertion_layer
        hidden = layers(hidden, (cos[:, :num_nodes], sin[:, :num_nodes]), 0, below)  # [B, N, d]
        hidden = self.ops.predictor_projection(hidden, drafters.weight, tree.lookahead)  # [B, N + P*k, d]
        return layers(hidden, (cos, sin), below, view.num_layers)

    def score(self, hidden: Tensor, tree: DraftTree) -> Scored:
        """Pass the rows through the head: all of them, or the node rows alone."""
        num_nodes = tree.size[0]
        few = few_rows(hidden.device, hidden.shape[0], hidden.shape[1], num_nodes)
        shares_head = few if self.head is None else self.head == "one-pass"
        # An update comes before the head.
        shares_head = shares_head and (self.drafters is None or self.drafters.updater is None)
        logits = self.view.logits(hidden if shares_head else hidden[:, :num_nodes])
        return Scored(logits[:, :num_nodes], logits[:, num_nodes:] if shares_head else None, hidden[:, num_nodes:])

    def max_depth(self, state: DecodeState) -> int:
        """The deepest level that the state's tree may have; on a CPU, where it may hold a branch, that it has."""
        num_nodes = state.tree.size[0]
        if num_nodes == 1:
            return 0
        if state.history is None:
            return self.num_offsets
        return max(self.num_offsets, making_way(num_nodes)) if self.keeps_size else int(state.tree.depths.max())

    def rows(self, num_nodes: int, num_lookahead: int) -> int:
        """Rows of a sequence, each a slot of the cache: N + P * k."""
        return num_nodes + num_lookahead * self.num_offsets

    def most_tokens(self, state: DecodeState) -> int:
        """Tokens that a step emits at most."""
        return 1 + max(self.num_offsets, 0 if state.history is None else MOST_BRANCH)

    def emit(self, state: DecodeState, chosen: Verified) -> Emitted:
        """Tokens of the accepted nodes and the bonus token."""
        return self.ops.emit_tokens(
            *chosen, state.tree.tokens, state.stop_tokens, state.context_lens, state.finished, state.remaining,
            self.num_offsets, self.num_embeddings, state.buffers.capacity - self.max_rows,
        )  # fmt: skip

    def draft(self, state: DecodeState, scored: Scored, emitted: Emitted) -> DraftTree:
        """Next tree, from the pseudo rows of the lookahead node nearest to the last accepted one."""
        drafter = state.drafter
        if drafter is None and state.tree.size == (1, 0):
            return state.tree.of_roots(emitted.root)
        if drafter is None or not scored.hidden.shape[1]:
            return first_tree(emitted.root, drafter, self.layer.compiled)
        updater, knows_root = None if self.drafters is None else self.drafters.updater, None
        if updater is None:
            scores, rows = self.pseudo_scores(scored, emitted.rows)
        else:
            scores, rows = self.updated_scores(updater, scored.hidden, emitted)
        if scores.shape[-1] > self.num_embeddings:  # A padded head scores tokens that could not be drafted.
            scores = scores[..., : self.num_embeddings].contiguous()
        probabilities, candidates = self.ops.top_marginals(scores, rows, min(drafter.num_ranks, scores.shape[-1]))
        if updater is not None:
            candidates, knows_root = updater.head.tokens_at(candidates), rows[:, 0] == 0
        return self._agreed(drafter.draft(probabilities, candidates, emitted.root, emitted.usable, knows_root))

    def updated_scores(self, updater: Updater, hidden: Tensor, emitted: Emitted) -> tuple[Tensor, Tensor]:
        """Scores [B, k, M] of the accepted node's pseudo rows, updated; and which of them drafts each depth, [B, k]."""
        k, sequence = self.num_offsets, torch.arange(len(hidden), device=hidden.device)
        offset = emitted.rows % k  # [B, k], m + 1 .. k where the lookahead node is m levels up, in counting from 0
        states = hidden.unflatten(1, (-1, k))[sequence, emitted.rows[:, 0] // k]  # [B, k, d]
        # The token after the lookahead node: the m-th before the root.
        after = emitted.tokens[sequence, (emitted.counts - 1 - offset[:, 0]).clamp(min=0)]
        return updater.scores(states, after.clamp(0, self.num_embeddings - 1)), offset

    def _agreed(self, tree: DraftTree) -> DraftTree:
        return tree if self.view.ranks.size == 1 else DraftTree(*self.view.ranks.agree(tuple(vars(tree).values())))

    def look_up(self, state: DecodeState, record: StepRecord, num_branch: int) -> int:
        """Note what the last step emitted, and add to its tree a branch of at most so many nodes that repeats earlier
        text. Returns the number of nodes before it."""
        state.tree = tree = state.tree.trimmed()
        self._look_up(state, record.tokens, record.counts, min(num_branch, MAX_NODES - tree.size[0]))
        state.tree = state.tree.trimmed() if num_branch else tree
        return tree.size[0]

    def _look_up(
        self, state: DecodeState, tokens: Tensor, counts: Tensor, num_branch: int, keeps_size: bool = False
    ) -> None:
        """`firp::lookup_branch` over the state's tree: the branch follows its nodes, or takes the place of the last."""
        assert state.history is not None
        tree = state.tree
        tokens, parents, depths, ancestors = self.ops.lookup_branch(
            state.history, state.context_lens, tokens, counts, tree.tokens, tree.parents, tree.depths, tree.ancestors,
            num_branch, LEAST_MATCH, MOST_MATCH, num_branch if keeps_size else 0,
        )  # fmt: skip
        state.tree = DraftTree(tokens, parents, depths, ancestors, tree.lookahead)

    def pseudo_scores(self, scored: Scored, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [B, *, V] that hold the pseudo rows [B, k] of `emit_tokens`, and which rows of them these are,
        [B, k]."""
        if scored.pseudo is not None:
            return scored.pseudo, rows
        index = torch.arange(rows.shape[1], device=rows.device)
        return self.view.logits(gather_rows(scored.hidden, rows)), index.expand_as(rows)
