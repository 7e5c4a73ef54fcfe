"""The decoding engine: prefill, then steps that verify one draft tree and prepare the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor
from transformers import PreTrainedModel

import firp_kernels
from firp.choice import Chooser, Greedy
from firp.cpu_layers import adapt_head, adapt_layer, adapt_norm
from firp.layer_view import DecoderView
from firp.predictor import FirpPredictor
from firp.prefill import CHUNK_TOKENS, prefill
from firp.state import DecodeState, StepRecord, gather_rows
from firp.trees import Drafter, DraftTree, TreeConfig, root_only

# Up to this many pseudo rows share the head's pass with the node rows: reading the head twice costs more.
SHARED_HEAD_ROWS = 16


@dataclass
class TreeAttention:
    """Attention of one step's rows: write them behind the context, then attend to context and tree."""

    ops: SimpleNamespace
    cache: Tensor
    context_lens: Tensor
    tree: DraftTree
    num_offsets: int

    def attend(self, layer_index, query, key, value, scale, sliding_window):
        key_cache, value_cache = self.cache[layer_index]
        self.ops.write_cache(key.transpose(1, 2), value.transpose(1, 2), key_cache, value_cache, self.context_lens)
        return self.ops.tree_attention(
            query.transpose(1, 2),
            key_cache,
            value_cache,
            self.context_lens,
            self.tree.depths,
            self.tree.ancestors,
            self.tree.lookahead,
            self.num_offsets,
            scale,
            sliding_window,
        )


class Engine:
    """Decodes with one model and, unless decoding plainly, one predictor.

    The model is never written to. Every emitted token is the model's own choice, whatever the predictor holds.

    Args:
        model: a Hugging Face causal decoder of a supported kind, on one device.
        predictor: None decodes plainly, one token a step, through the same code.
        tree: size and kind of the draft tree; None takes the one stored beside the predictor.
        impl: implementation of every op, or of each op named in a mapping; None, and an op that is not named, takes the
            owner on the device (see `firp_kernels.bind`).

    Raises:
        ValueError: a model of another kind, a predictor for another model (`PredictorMismatch`), a tree out of range.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        predictor: FirpPredictor | None = None,
        tree: TreeConfig | None = None,
        impl: str | Mapping[str, str] | None = None,
    ) -> None:
        self.model = model
        self.ops = firp_kernels.bind(impl)
        self.view = DecoderView(model, adapt_layer, adapt_norm(model), adapt_head(model))
        self.predictor = predictor
        self.tree = None
        self.num_offsets = 0
        self._drafters: dict[int, Drafter | None] = {}
        if predictor is not None:
            predictor.check_model(model)
            self.num_offsets = predictor.num_offsets
            self.tree = tree or TreeConfig.of(predictor)
            self._shrinks = tree is None
            self.weight = predictor.weight.detach().to(self.view.device, self.view.dtype)

    def drafter(self, batch_size: int) -> Drafter | None:
        """What drafts for a batch of this size; None where it decodes plainly.

        A tree that was asked for serves every batch size; the predictor's own shrinks as the batch grows.
        """
        if self.predictor is None:
            return None
        if batch_size not in self._drafters:
            config = self.tree.for_batch(batch_size) if self._shrinks else self.tree
            plain = config.num_nodes == 1
            self._drafters[batch_size] = None if plain else Drafter(config, self.num_offsets, self.ops)
        return self._drafters[batch_size]

    @property
    def max_rows(self) -> int:
        """Cache slots one step writes at most: N + P * k."""
        if self.tree is None:
            return 1
        return self.tree.num_nodes + self.tree.num_lookahead * self.num_offsets

    def check_lengths(self, prompt_lengths: list[int], max_new_tokens: int) -> None:
        """Raise ValueError, with the numbers, for a request that cannot be decoded."""
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: got {max_new_tokens}, expected at least 1")
        if not prompt_lengths or min(prompt_lengths) < 1:
            raise ValueError("input_ids: got an empty prompt, expected at least one token")
        limit = self.view.config.max_position_embeddings
        if max(prompt_lengths) + max_new_tokens > limit:
            raise ValueError(
                f"max_new_tokens: prompt of {max(prompt_lengths)} tokens plus {max_new_tokens} new ones exceed the "
                f"model's context of {limit}"
            )

    @torch.no_grad()
    def start(
        self,
        prompts: list[Tensor],
        max_new_tokens: int,
        stop_tokens: list[int],
        plain: bool = False,
        chunk_tokens: int | None = None,
    ) -> DecodeState:
        """Prefill `prompts`, each [T] int64 without padding, and return the state before the first step.

        Args:
            prompts: B token tensors.
            max_new_tokens: tokens after which a sequence ends.
            stop_tokens: ids that end a sequence.
            plain: decode this run without drafting.
            chunk_tokens: prompt tokens that pass the model at once; None takes the engine's default.

        Raises:
            ValueError: an empty prompt, no token to generate, or more than the model's context holds.
        """
        lengths = [len(prompt) for prompt in prompts]
        self.check_lengths(lengths, max_new_tokens)
        device, config = self.view.device, self.view.config
        heads = config.num_key_value_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        capacity = max(lengths) + max_new_tokens + self.max_rows
        shape = (self.view.num_layers, 2, len(prompts), capacity, heads, width)
        cache = torch.empty(shape, dtype=self.view.dtype, device=device)
        for b, prompt in enumerate(prompts):
            prefill(self.view, prompt[:-1].to(device), cache[:, :, b], chunk_tokens or CHUNK_TOKENS)
        roots = torch.stack([prompt[-1] for prompt in prompts]).to(device)
        drafts = not plain and self.drafter(len(prompts)) is not None
        return DecodeState(
            cache=cache,
            context_lens=torch.tensor([length - 1 for length in lengths], dtype=torch.int32, device=device),
            tree=root_only(roots, num_lookahead=int(drafts)),
            sequence=torch.arange(len(prompts), device=device),
            finished=torch.zeros(len(prompts), dtype=torch.bool, device=device),
            remaining=torch.full((len(prompts),), max_new_tokens, device=device),
            stop_tokens=torch.tensor(stop_tokens, dtype=torch.long, device=device),
            plain=plain,
        )

    @torch.no_grad()
    def step(self, state: DecodeState, choose: Chooser | None = None) -> StepRecord:
        """One forward: verify the tree, commit what was accepted, emit it, draft the next tree.

        Args:
            state: changed in place.
            choose: turns scores into tokens (`firp.choice`); None is greedy.
        """
        rows, num_nodes = self.forward(state), state.tree.tokens.shape[1]
        shares_head = rows.shape[1] - num_nodes <= SHARED_HEAD_ROWS
        logits = self.view.logits(rows if shares_head else rows[:, :num_nodes])
        pseudo = (logits if shares_head else rows)[:, num_nodes:]
        logits = logits[:, :num_nodes]
        max_depth = self.num_offsets if state.tree.tokens.shape[1] > 1 else 0
        choose = choose or Greedy(self.ops)
        (path, num_accepted, bonus, _, last_slot, shift, status), scores = choose(logits, state, max_depth)
        self.ops.commit_cache(state.cache, state.context_lens, path, num_accepted, state.finished)
        tokens, counts = self.emit(state, path, num_accepted, bonus, status)
        root = bonus.clamp(min=0)
        state.tree = self.draft(state, pseudo, shares_head, root, last_slot, shift)
        return StepRecord(tokens, counts, state.finished, status, path, logits, scores)

    def compact(self, state: DecodeState) -> DecodeState:
        """Let finished sequences leave the batch; the tree grows with the room they leave."""
        if not bool(state.finished.any()):
            return state
        state = state.keep((~state.finished).nonzero()[:, 0])
        if state.tree.lookahead.shape[1] == 0 and not state.plain and self.drafter(state.batch_size) is not None:
            state.tree = root_only(state.tree.tokens[:, 0], num_lookahead=1)
        return state

    @torch.no_grad()
    def forward(self, state: DecodeState) -> Tensor:
        """Final hidden states of the node rows, then of the pseudo rows, [B, N + P*k, d]."""
        tree, view, k = state.tree, self.view, self.num_offsets
        num_nodes = tree.tokens.shape[1]
        step = TreeAttention(self.ops, state.cache, state.context_lens, tree, k)
        positions = (state.context_lens[:, None] + tree.depths).long()
        if tree.lookahead.shape[1]:
            base = gather_rows(positions, tree.lookahead.long().clamp(min=0))
            offsets = torch.arange(1, k + 1, device=positions.device)
            positions = torch.cat([positions, (base[..., None] + offsets).flatten(1)], 1)
        hidden = view.embed(tree.tokens)
        cos, sin = view.rotary(hidden, positions)
        if not tree.lookahead.shape[1]:
            return view.run_layers(hidden, (cos, sin), step, 0, view.num_layers)
        below = self.predictor.insertion_layer
        hidden = view.run_layers(hidden, (cos[:, :num_nodes], sin[:, :num_nodes]), step, 0, below)
        hidden = self.ops.predictor_projection(hidden, self.weight, tree.lookahead)
        return view.run_layers(hidden, (cos, sin), step, below, view.num_layers)

    def emit(
        self, state: DecodeState, path: Tensor, num_accepted: Tensor, bonus: Tensor, status: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Cut the accepted tokens at the first stop token and at the limit; update `finished` and `remaining`.

        Returns:
            tokens [B, max_depth + 1] int64, -1 past the end, and counts [B] int64, as in `StepRecord`.
        """
        accepted = gather_rows(state.tree.tokens, path[:, 1:].long().clamp(min=0))
        index = torch.arange(path.shape[1], device=path.device)
        tokens = torch.cat([accepted, bonus[:, None]], 1)
        tokens = torch.where(index == num_accepted[:, None], bonus[:, None], tokens)
        counts = torch.minimum(num_accepted.long() + 1, state.remaining)
        counts = counts.masked_fill(state.finished | (status != 0), 0)
        stops = torch.isin(tokens, state.stop_tokens) & (index < counts[:, None])
        stopped = stops.any(1)
        counts = torch.where(stopped, stops.int().argmax(1) + 1, counts)
        state.remaining = state.remaining - counts
        state.finished = state.finished | stopped | (state.remaining == 0) | (status != 0)
        return tokens.masked_fill(index >= counts[:, None], -1), counts

    def draft(
        self, state: DecodeState, pseudo: Tensor, are_logits: bool, root: Tensor, last_slot: Tensor, shift: Tensor
    ) -> DraftTree:
        """Next tree from the pseudo rows of the lookahead node nearest to the last accepted one.

        If that node lies `shift` levels up, its offsets shift + 1 .. k serve depths 1 .. k - shift. `pseudo` holds the
        rows' scores [B, P*k, V] where `are_logits`, else their hidden states [B, P*k, d].
        """
        drafter = None if state.plain else self.drafter(state.batch_size)
        if pseudo.shape[1] == 0 or drafter is None:
            return root_only(root, num_lookahead=int(drafter is not None))
        k = self.num_offsets
        offset = (torch.arange(k, device=pseudo.device) + shift[:, None]).clamp(max=k - 1)
        rows = gather_rows(pseudo, last_slot.long().clamp(min=0)[:, None] * k + offset)
        logits = (rows if are_logits else self.view.logits(rows)).float()
        top = logits.topk(min(drafter.num_ranks, logits.shape[-1]), dim=-1)
        probabilities = (top.values - logits.logsumexp(-1, keepdim=True)).exp().nan_to_num(nan=0.0)
        return drafter.draft(probabilities, top.indices, root, (k - shift).clamp(min=0).to(torch.int32))
