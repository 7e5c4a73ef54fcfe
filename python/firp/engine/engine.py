"""The decoding engine: prefill, then steps that verify one draft tree and prepare the next."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

import firp_kernels
from firp.decoder.cpu_layers import adapt_head, adapt_layer, adapt_norm
from firp.decoder.joint_linears import JointLinears
from firp.decoder.model_rules import head_counts
from firp.decoder.modes import on_own_device, plain_tensors
from firp.decoder.rotary import check_lengths as check_positions
from firp.decoder.view import DecoderView
from firp.drafting.predictor import FirpPredictor, check_drafting
from firp.drafting.transition import token_tables
from firp.drafting.trees import Drafter, DraftTree, TreeConfig, first_tree
from firp.drafting.tuned import HEADS, own_tree
from firp.engine.buffers import SMALLEST_BUCKET, Buffers, allocated_slots, next_power_of_two
from firp.engine.chooser import Chooser, Greedy
from firp.engine.graphs import StepRunner, make_runner
from firp.engine.layers import compiles, layer_function, run_layers
from firp.engine.memory import check_memory
from firp.engine.rows import few_rows, fuse_beside_layers, pseudo_scores
from firp.engine.state import DecodeState, StepRecord
from firp.engine.warm_up import warm_up
from firp_kernels import Emitted
from firp_kernels.registry import owner


class Engine:
    """Decodes with one model and, unless decoding plainly, one predictor.

    The model is never written to. Every emitted token is the model's own choice, whatever the predictor holds.

    Args:
        model: a Hugging Face causal decoder of a supported kind, on one device.
        predictor: None decodes plainly, one token a step, through the same code.
        tree: size and kind of the draft tree; None takes the one stored beside the predictor.
        impl: implementation of every op, or of each op named in a mapping; None, and an op that is not named, takes the
            owner on the device (see `firp_kernels.bind`).
        head: "one-pass" scores node and pseudo rows together, "two-pass" the nodes first and then the accepted node's
            pseudo rows alone; None takes one pass for few rows (`firp.engine.rows.few_rows`).
        graphs: replay steps as CUDA graphs; None does so wherever a GPU and kernels for it serve the model.
        compile: compile the model's layers; the first step of each shape then takes seconds. None does so on a GPU.

    One engine decodes many runs, one after another or several at a time; what it allocated for a run that
    `Engine.release` gave back, and the steps captured over it, serve the next.

    Raises:
        ValueError: a model of another kind, a predictor for another model (`PredictorMismatch`), a tree out of range,
            graphs where they cannot be captured, layers compiled over a named implementation.
    """

    @plain_tensors
    def __init__(
        self,
        model: PreTrainedModel,
        predictor: FirpPredictor | None = None,
        tree: TreeConfig | None = None,
        impl: str | Mapping[str, str] | None = None,
        head: str | None = None,
        graphs: bool | None = None,
        compile: bool | None = None,
    ) -> None:
        if head is not None and head not in HEADS:
            raise ValueError(f"head: got {head!r}, expected one of {', '.join(HEADS)}, or None")
        check_drafting(predictor, tree)
        self.model = model
        self.ops = firp_kernels.bind(impl)
        self.head = head
        # The reference is torch throughout, the model's own linear layers and norms included.
        adapted = () if impl == "reference" else (adapt_layer, adapt_norm, adapt_head)
        self.view = DecoderView(model, *(functools.partial(adapt, ops=self.ops) for adapt in adapted))
        self._joint = JointLinears(self.view, self.view.layers if impl is None else [])
        self.num_embeddings = model.get_input_embeddings().weight.shape[0]
        self.predictor = predictor
        self.tree = None
        self.num_offsets = 0
        self._drafters: dict[int, Drafter | None] = {}
        self._spare: list[Buffers] = []
        self._runner: StepRunner = make_runner(self.view, graphs, impl)
        on_cpu = impl is None and self.view.device.type == "cpu"
        own_attention = on_cpu and owner("tree_attention", "cpu") == "extension"
        self.prefill_attention = self.ops.tree_attention if own_attention else None
        self._layer = layer_function(compiles(compile, self.view.device, impl), self.ops)
        self._row_rotary = fuse_beside_layers(self.view, self._layer.compiled)
        if predictor is not None:
            predictor.check_model(model)
            self._shrinks = tree is None
            if tree is None:
                self.predictor, tree, tuned_head = own_tree(predictor, self.view.device, self.view.dtype)
                self.head = head or tuned_head
            self.num_offsets = self.predictor.num_offsets
            self.tree = tree
            self.weight = self.predictor.weight.detach().to(self.view.device, self.view.dtype)
            self.transition = token_tables(self.view, self.predictor.transition)

    def drafter(self, batch_size: int) -> Drafter | None:
        """What drafts for a batch of this size; None where it decodes plainly.

        A tree that was asked for serves every batch size; the predictor's own shrinks as the batch grows.
        """
        if self.predictor is not None and batch_size not in self._drafters:
            config = self.tree.for_batch(batch_size) if self._shrinks else self.tree
            plain = config.num_nodes == 1
            self._drafters[batch_size] = None if plain else Drafter(config, self.num_offsets, self.ops, self.transition)
        return self._drafters.get(batch_size)

    @property
    def captures(self) -> bool:
        """Whether steps are replayed from CUDA graphs."""
        return self._runner.captures

    @property
    def max_rows(self) -> int:
        """Cache slots one step writes at most: N + P * k."""
        return 1 if self.tree is None else self.tree.num_nodes + self.tree.num_lookahead * self.num_offsets

    def check_lengths(self, prompt_lengths: list[int], max_new_tokens: int) -> None:
        """Raise ValueError, with the numbers, for a request that cannot be decoded."""
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: got {max_new_tokens}, expected at least 1")
        if not prompt_lengths:
            raise ValueError("input_ids: got no prompts, expected at least one")
        for row, length in enumerate(prompt_lengths):
            if length < 1:
                raise ValueError(f"input_ids: got an empty prompt in row {row}, expected at least one token")
            check_positions(self.view.config, length, max_new_tokens)

    @plain_tensors
    @on_own_device
    def start(
        self,
        prompts: list[Tensor],
        max_new_tokens: int,
        stop_tokens: list[int],
        plain: bool = False,
        chunk_tokens: int | None = None,
        checked: bool = False,
    ) -> DecodeState:
        """Prefill `prompts`, each [T] int64 without padding, and return the state before the first step.

        Args:
            prompts: B token tensors.
            max_new_tokens: tokens after which a sequence ends.
            stop_tokens: ids that end a sequence.
            plain: decode this run without drafting.
            chunk_tokens: prompt tokens, of one prompt or of several, that pass the model at once; None takes the engine's default.
            checked: the engine was made just now, so that the model need not be checked again.

        Raises:
            ValueError: an empty prompt, no token to generate, more than the model's context holds, or a model whose
                modules were replaced or hooked since the engine was made.
        """
        if not checked:
            self.view.check_unchanged()
        lengths = [len(prompt) for prompt in prompts]
        self.check_lengths(lengths, max_new_tokens)
        size, device = len(prompts), self.view.device
        buffers = self._buffers(size, max(lengths) + max_new_tokens + self.max_rows)
        roots = torch.stack([prompt[-1] for prompt in prompts]).to(device)
        drafter = None if plain else self.drafter(size)
        committed = [length - 1 for length in lengths]
        state = DecodeState(
            buffers=buffers,
            cache=buffers.cache[:, :, :size],
            context_lens=buffers.context_lens[:size].copy_(torch.tensor(committed)),
            tree=first_tree(roots, drafter, self._layer.compiled),
            sequence=buffers.sequence[:size].copy_(torch.arange(size, device=device)),
            finished=buffers.finished[:size].fill_(False),
            remaining=buffers.remaining[:size].fill_(max_new_tokens),
            seed=buffers.seed[:size].fill_(0),
            stop_tokens=buffers.set_stop_tokens(stop_tokens),
            lengths=committed,
            plain=plain,
        )
        self._joint.refresh()
        # Last: copies from the host would wait for it on a GPU.
        self._runner.prefill(self, buffers, [prompt[:-1] for prompt in prompts], chunk_tokens)
        return state

    def _buffers(self, batch_size: int, slots: int) -> Buffers:
        """Spare buffers that are large enough, their graphs over the weights where these lie now; or new ones."""
        spare = self._spare.pop() if self._spare else None
        addresses = self.view.addresses() if self.captures else ()
        fits = spare is not None and spare.batch_size >= batch_size and spare.capacity >= slots
        if fits and spare.addresses == addresses:
            return spare
        del spare
        capacity = allocated_slots(slots)
        check_memory(self, batch_size, capacity)
        heads = head_counts(self.view.config)[1:]
        buffers = Buffers.allocate(
            self.view.num_layers, batch_size, capacity, *heads, self.view.dtype, self.view.device
        )
        buffers.addresses = addresses
        return buffers

    @plain_tensors
    @on_own_device
    def warm_up(
        self, batch_sizes: tuple[int, ...] = (1,), max_len: int = SMALLEST_BUCKET, progress: bool = True
    ) -> None:
        """Compile layers, capture greedy steps and the passes of prompts ahead of the first request.

        Args:
            batch_sizes: as they will be decoded; the largest comes first, and its buffers serve all.
            max_len: tokens that prompt and output may hold together; every cache bucket and prompt length up to there is captured.
            progress: show a bar, on a terminal.

        Raises:
            ValueError: a max_len below 2 or past the model's context.
        """
        if max_len < 2:
            raise ValueError(f"max_len: got {max_len}, expected at least 2")
        for size in tqdm(
            sorted(batch_sizes, reverse=True), desc="warm up", unit="batch", disable=None if progress else True
        ):
            warm_up(self, self._runner, size, max_len)

    @on_own_device
    def release(self, state: DecodeState) -> None:
        """Take back what a run used, for the next one; the state must not be stepped any more."""
        self._spare = [state.buffers]

    @plain_tensors
    @on_own_device
    def step(self, state: DecodeState, choose: Chooser | None = None) -> StepRecord:
        """One forward: verify the tree, commit what was accepted, emit it, draft the next tree.

        Args:
            state: changed in place.
            choose: turns scores into tokens (`firp.sampling.choosers`); None is greedy.
        """
        return self._runner.step(self, state, choose or Greedy(self.ops))

    @plain_tensors
    @on_own_device
    def run_step(self, state: DecodeState, choose: Chooser) -> StepRecord:
        """The step itself: device work in static shapes, which a graph may capture where the chooser is `on_device`."""
        rows, num_nodes = self.forward(state), state.tree.tokens.shape[1]
        shares_head = few_rows(rows, num_nodes) if self.head is None else self.head == "one-pass"
        logits = self.view.logits(rows if shares_head else rows[:, :num_nodes])
        pseudo = (logits if shares_head else rows)[:, num_nodes:]
        logits = logits[:, :num_nodes]
        max_depth = self.num_offsets if num_nodes > 1 else 0
        chosen, scores = choose(logits, state, max_depth)
        emitted = self.ops.emit_tokens(
            *chosen, state.tree.tokens, state.stop_tokens, state.context_lens, state.finished, state.remaining,
            self.num_offsets, self.num_embeddings, state.buffers.capacity - self.max_rows,
        )  # fmt: skip
        self.ops.commit_cache(state.cache, state.context_lens, chosen.path, emitted.kept, state.finished)
        state.finished.copy_(emitted.finished)
        state.tree = self.draft(state, pseudo, shares_head, emitted)
        tokens, counts, finished = emitted.tokens, emitted.counts, emitted.finished
        packed = None if tokens.device.type == "cpu" else emitted.packed
        held = (logits, scores) if state.keeps_scores else (None, None)
        return StepRecord(tokens, counts, finished, chosen.status, chosen.path, *held, packed)

    @plain_tensors
    @on_own_device
    def compact(self, state: DecodeState, slots: list[int]) -> list[int]:
        """Go on with the sequences at `slots` alone; the tree grows with the room the others leave.

        Returns:
            For each place of the new batch, the slot whose sequence it now holds.
        """
        places = state.keep(slots)
        if state.tree.size[1] == 0 and not state.plain and self.drafter(state.batch_size) is not None:
            state.tree = first_tree(state.tree.tokens[:, 0], self.drafter(state.batch_size), self._layer.compiled)
        return places

    def compacted_size(self, batch_size: int) -> int:
        """Sequences a batch is cut to when `batch_size` go on: the next power of two where every size is captured."""
        return next_power_of_two(batch_size) if self.captures else batch_size

    @plain_tensors
    @on_own_device
    def forward(self, state: DecodeState) -> Tensor:
        """Final hidden states of the node rows, then of the pseudo rows, [B, N + P*k, d]."""
        tree, view, k = state.tree, self.view, self.num_offsets
        num_nodes, num_lookahead = tree.size
        hidden = view.embed(tree.tokens)
        cos, sin = self._row_rotary(hidden, tree.depths, tree.lookahead, state.context_lens, k)

        def layers(hidden: Tensor, position_embeddings: tuple[Tensor, Tensor], start: int, stop: int) -> Tensor:
            return run_layers(
                self._layer, view.layers[start:stop], hidden, position_embeddings, state.cache[start:stop],
                state.context_lens, tree, k,
            )  # fmt: skip

        if not num_lookahead:
            return layers(hidden, (cos, sin), 0, view.num_layers)
        below = self.predictor.insertion_layer
        hidden = layers(hidden, (cos[:, :num_nodes], sin[:, :num_nodes]), 0, below)
        hidden = self.ops.predictor_projection(hidden, self.weight, tree.lookahead)
        return layers(hidden, (cos, sin), below, view.num_layers)

    def draft(self, state: DecodeState, pseudo: Tensor, are_logits: bool, emitted: Emitted) -> DraftTree:
        """Next tree from the pseudo rows of the lookahead node nearest to the last accepted one.

        `pseudo` holds the rows' scores [B, P*k, V] where `are_logits`, else their hidden states [B, P*k, d].
        """
        drafter = None if state.plain else self.drafter(state.batch_size)
        if drafter is None and state.tree.size == (1, 0):
            return state.tree.of_roots(emitted.root)
        if pseudo.shape[1] == 0 or drafter is None:
            return first_tree(emitted.root, drafter, self._layer.compiled)
        scores, rows = pseudo_scores(self.view, pseudo, are_logits, emitted.rows)
        if scores.shape[-1] > self.num_embeddings:  # A padded head scores tokens that could not be drafted.
            scores = scores[..., : self.num_embeddings].contiguous()
        probabilities, candidates = self.ops.top_marginals(scores, rows, min(drafter.num_ranks, scores.shape[-1]))
        return drafter.draft(probabilities, candidates, emitted.root, emitted.usable)
