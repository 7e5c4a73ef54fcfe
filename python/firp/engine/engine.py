"""The decoding engine: prefill, then steps that verify one draft tree and prepare the next."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

import firp_kernels
from firp.decoder.cpu_layers import adapters_over, usual_adapters
from firp.decoder.joint_linears import JointLinears
from firp.decoder.modes import on_own_device, plain_tensors
from firp.decoder.view import DecoderView
from firp.drafting.choices import Rung
from firp.drafting.drafters import check_drafting, check_head
from firp.drafting.predictor import FirpPredictor
from firp.drafting.trees import Drafter, TreeConfig, first_tree
from firp.engine.buffers import SMALLEST_BUCKET, Buffers, allocated_slots, next_power_of_two
from firp.engine.chooser import Chooser, Greedy
from firp.engine.graphs import StepRunner, drafted_size, make_runner
from firp.engine.layers import compiles, layer_function
from firp.engine.memory import check_memory
from firp.engine.named_ops import check_named, prefill_attention
from firp.engine.prefill import check_prompts, padded_length
from firp.engine.same_run import check_same_run
from firp.engine.state import DecodeState, StepRecord
from firp.engine.step import Step
from firp.engine.steps import Steps
from firp.engine.tree_choice import TreeChoice


class Engine:
    """Decodes with one model and, unless decoding plainly, one predictor.

    The model is never written to. Every emitted token is the model's own choice, for any predictor.

    Args:
        model: a Hugging Face causal decoder of a supported kind, on one device.
        predictor: None decodes plainly, one token a step, through the same code.
        tree: size and kind of the draft tree. None takes what pays on this machine: trees are timed at the first run of
            each batch size, once (`firp.engine.automatic`), and change with how well drafts do. A predictor without an
            acceptance profile then drafts the tree in its configuration.
        impl: implementation of every op, or of each op named in a mapping; None, and an op that is not named, takes the
            owner on the device (see `firp_kernels.bind`).
        head: "one-pass" scores node and pseudo rows together, "two-pass" the nodes first and then the accepted node's
            pseudo rows alone; None takes one pass for few rows (`firp.engine.rows.few_rows`).
        graphs: replay steps as CUDA graphs; None does so on a GPU where every op has a kernel.
        compile: compile the model's layers; the first step of each shape then takes seconds. None does so on a GPU.

    One engine decodes many runs, in turn or at once. A later run reuses the buffers and captured steps that
    `Engine.release` gave back. Over a model that transformers sharded every rank makes the same calls.

    Raises:
        ValueError: a model of another kind, a predictor for another model (`PredictorMismatch`), a tree out of range,
            graphs that cannot be captured, layers compiled over a named implementation or over shards.
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
        check_drafting(predictor, tree)
        check_head(head, predictor)
        self.model = model
        self.ops = firp_kernels.bind(impl)
        self.head = head
        # The reference is torch throughout, the model's own linear layers and norms included.
        over_ops = usual_adapters() if impl is None else adapters_over(self.ops)
        self.view = DecoderView(model, None if impl == "reference" else over_ops)
        check_named(impl, self.view, predictor, tree)
        self._joint = None if isinstance(impl, str) else JointLinears(self.view)
        self.predictor = predictor
        self._spare: list[Buffers] = []
        self.runner: StepRunner = make_runner(self.view, graphs, impl)
        self._prefill_attention = prefill_attention(impl, self.ops, self.view.device)
        self._layer = layer_function(compiles(compile, self.view, impl), self.ops, self.view.device, impl is not None)
        self.steps = Steps(self.view, self.ops, self._layer, self._prefill_attention, predictor, head)
        self._trees: TreeChoice | None = None
        if predictor is not None:
            predictor.check_model(model)
            times_steps = impl is None and not (self._layer.compiled and self.view.device.type == "cpu")
            self._trees = TreeChoice(predictor, tree, self.steps, self.runner, times_steps)

    @property
    def _step(self) -> Step:
        return self.steps.plain if self._trees is None else self._trees.step

    def rungs(self, batch_size: int) -> tuple[Rung, ...] | None:
        """Trees that a run of B sequences changes between, with their figures; None where the tree stays."""
        return None if self._trees is None else self._trees.rungs(batch_size)

    def drafter(self, batch_size: int, tree: TreeConfig | None = None) -> Drafter | None:
        """What drafts for a batch of this size, None where it decodes plainly.

        A tree that was passed is used at every batch size; the predictor's own shrinks as the batch grows; where trees
        were timed it is the fastest.

        Args:
            tree: another one, such as that of a rung.
        """
        drafters = self._step.drafters
        if self._trees is None or drafters is None:
            return None
        return drafters.of(self._trees.of(batch_size) if tree is None else tree)

    @property
    def captures(self) -> bool:
        """Whether steps are replayed from CUDA graphs."""
        return self.runner.captures

    @property
    def looks_up(self) -> bool:
        """Whether runs look up branches: where trees change by themselves."""
        return self._trees is not None and self._trees.automatic is not None

    @property
    def num_offsets(self) -> int:
        """k, 0 where nothing is drafted."""
        return self._step.num_offsets

    @property
    def max_rows(self) -> int:
        """Cache slots one step writes at most: N + P * k, and those of a branch."""
        return self._step.max_rows

    def slots(self, state: DecodeState, choose: Chooser, committed: int, unread: int) -> int:
        """Cache slots that the next step may reach, after so many committed tokens and so many steps not read yet."""
        return committed + unread * self._step.most_tokens(state) + self.runner.rows(self._step, state, choose)

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
            chunk_tokens: prompt tokens, of one prompt or of several, that pass the model at once; None takes the
                engine's default.
            checked: the engine was made just now, so that the model need not be checked again.

        Raises:
            ValueError: an empty prompt, no token to generate, more than the model's context holds, or a model whose
                modules were replaced or hooked since the engine was made.
        """
        if not checked:
            self.view.check_unchanged()
        lengths = [len(prompt) for prompt in prompts]
        check_prompts(self.view.config, lengths, max_new_tokens)
        size, device = len(prompts), self.view.device
        asked = {"max_new_tokens": max_new_tokens, "stop_tokens": stop_tokens, "plain": plain, "chunk": chunk_tokens}
        check_same_run(self.steps, self._trees, prompts, asked)
        if self._trees is not None and not plain:
            self._trees.prepare(size)
        drafter = None if plain else self.drafter(size)
        buffers = self._buffers(size, max(lengths) + max_new_tokens + self.max_rows)
        roots = torch.stack([prompt[-1] for prompt in prompts]).to(device)
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
            drafter=drafter,
            plain=plain,
            history=buffers.history[:size] if self.looks_up and not plain else None,
        )
        if state.history is not None:
            for text, prompt in zip(state.history, prompts, strict=True):
                text[: len(prompt)] = prompt
        if self._joint is not None:
            self._joint.refresh()
        # Last: copies from the host would wait for it on a GPU.
        self.runner.prefill(self._step, buffers, [prompt[:-1] for prompt in prompts], chunk_tokens)
        return state

    def _buffers(self, batch_size: int, slots: int) -> Buffers:
        """Spare buffers that are large enough, their graphs over the weights where these are now; or new ones."""
        spare = None
        with suppress(IndexError):  # none is left, also where another thread took it just now
            spare = self._spare.pop()
        addresses = self.view.addresses() if self.captures else ()
        if spare is not None and spare.holds(batch_size, slots) and spare.addresses == addresses:
            return spare
        del spare
        view, capacity = self.view, allocated_slots(slots)
        largest = None if self._trees is None else self._trees.largest(batch_size)
        check_memory(view, batch_size, capacity, largest, self.num_offsets, self.captures)
        buffers = Buffers.allocate(view.num_layers, batch_size, capacity, *view.heads[1:], view.dtype, view.device)
        buffers.addresses = addresses
        return buffers

    @plain_tensors
    @on_own_device
    def warm_up(
        self, batch_sizes: tuple[int, ...] = (1,), max_len: int = SMALLEST_BUCKET, progress: bool = True
    ) -> None:
        """Compile layers, capture greedy steps and the passes of prompts ahead of the first request.

        Args:
            batch_sizes: as they will be decoded; the largest comes first, and its buffers fit all.
            max_len: tokens that prompt and output may hold together; every cache bucket and prompt length up to there
                is captured.
            progress: show a bar, on a terminal.

        Raises:
            ValueError: a max_len below 2 or past the model's context.
        """
        if max_len < 2:
            raise ValueError(f"max_len: got {max_len}, expected at least 2")
        sizes = sorted(batch_sizes, reverse=True)
        for size in tqdm(sizes, desc="warm up", unit="batch", disable=None if progress else True):
            self._warm_up(size, max_len)

    def _warm_up(self, batch_size: int, max_len: int) -> None:
        """Pass prompts of every padded length, and take steps over every bucket of the cache."""
        state = self.start([torch.zeros(1, dtype=torch.int64)] * batch_size, max_len - 1, [])
        if self.captures:
            for length in sorted({padded_length(length) for length in range(1, max_len)}):
                prompt = torch.zeros(min(length, max_len - 1), dtype=torch.int64)
                self.runner.prefill(self._step, state.buffers, [prompt] * batch_size, None)
        for tree in [None] if self._trees is None else self._trees.trees(batch_size):
            state.drafter = self.drafter(batch_size, tree)
            state.tree = first_tree(state.tree.tokens[:, 0], state.drafter, self._layer.compiled)
            least = self._step.rows(*drafted_size(state))
            most = max_len - 1 + self._step.most_tokens(state) + least
            needed = *range(least, most, SMALLEST_BUCKET), most
            for slots in sorted({state.buffers.bucket(slots) for slots in needed}):
                state.use_slots(slots)
                for _ in range(2):  # The first tree is the root alone.
                    state.context_lens.zero_()
                    self.step(state)
        self.release(state)

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
        return self.runner.step(self._step, state, choose or Greedy(self.ops))

    @plain_tensors
    def look_up(self, state: DecodeState, record: StepRecord, num_branch: int) -> int:
        """On a CPU, after each step of a run that `looks_up`: add a branch of at most so many nodes to its new tree.

        `record` is that of the step. Returns the nodes of the tree before.
        """
        return self._step.look_up(state, record, num_branch)

    @plain_tensors
    @on_own_device
    def compact(self, state: DecodeState, slots: list[int]) -> list[int]:
        """Go on with the sequences at `slots` alone; the tree grows with the room the others leave. Returns the slot of
        each place's sequence.
        """
        places = state.keep(slots)
        state.drafter = None if state.plain else self.drafter(state.batch_size)
        if state.tree.size[1] == 0 and state.drafter is not None:
            state.tree = first_tree(state.tree.tokens[:, 0], state.drafter, self._layer.compiled)
        return places

    def compacted_size(self, batch_size: int) -> int:
        """Sequences a batch is cut to when `batch_size` go on: the next power of two where every size is captured."""
        return next_power_of_two(batch_size) if self.captures else batch_size
