"""How an engine runs its steps and its prompts: as they come, or on a GPU replayed from CUDA graphs captured once per
shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from firp.decoder.view import DecoderView
from firp.drafting.trees import DraftTree, first_tree
from firp.engine.buffers import Buffers
from firp.engine.chooser import Chooser
from firp.engine.prefill import (
    CAPTURED_PROMPTS,
    CAPTURED_ROWS,
    PrefillAttention,
    default_chunk,
    padded_length,
    pass_chunk,
    prefill,
    prefill_batch,
)
from firp.engine.state import DecodeState, StepRecord
from firp.engine.step import Step
from firp_kernels import registry

# Every op of a step, and whether its reference reads values back on a GPU, which no capture allows.
STEP_OPS = {
    "write_cache": False, "tree_attention": True, "write_and_attend": False, "predictor_projection": False,
    "verify_tree": False, "emit_tokens": False, "commit_cache": True, "top_marginals": False,
    "condition_marginals": False, "draft_tree": False, "lookup_branch": False, "keep_top_p": False,
}  # fmt: skip
# Architectures whose grouped matrix product, in bfloat16, takes the groups' sizes from the device.
GROUPED_MM = (9, 10)
WARM_UP_STEPS = 2

R = TypeVar("R")


class StepRunner(Protocol):
    """Fills the cache with prompts and runs the steps after them.

    Attributes:
        captures: whether steps are captured, so that every new shape costs a capture.
    """

    captures: bool

    def prefill(self, step: Step, buffers: Buffers, prompts: list[Tensor], chunk_tokens: int | None) -> None:
        """Fill the first places of the cache with the prompts, each [T] int64 without its last token."""

    def step(self, step: Step, state: DecodeState, choose: Chooser) -> StepRecord: ...

    def rows(self, step: Step, state: DecodeState, choose: Chooser) -> int:
        """Cache slots that the next step writes."""


class EagerRunner:
    """Runs every step as it comes."""

    captures = False

    def prefill(self, step: Step, buffers: Buffers, prompts: list[Tensor], chunk_tokens: int | None) -> None:
        prefill(step.view, prompts, buffers.cache, chunk_tokens, step.prefill_attention)

    def step(self, step: Step, state: DecodeState, choose: Chooser) -> StepRecord:
        return step.run(state, choose)

    def rows(self, step: Step, state: DecodeState, choose: Chooser) -> int:
        return step.rows(*state.tree.size)


@dataclass(frozen=True)
class CapturedPrefill:
    """A captured pass of n prompts of up to T tokens, and the tensors it reads.

    Attributes:
        tokens: [n, T] int64, padded on the right with any tokens.
        lengths_and_places: [2, n] int64 tokens of each prompt, its last one included, and the place it fills.
    """

    graph: torch.cuda.CUDAGraph
    tokens: Tensor
    lengths_and_places: Tensor

    def set_prompts(self, prompts: list[Tensor], places: list[int]) -> None:
        rows = pad_sequence(prompts, batch_first=True)
        self.tokens[:, : rows.shape[1]] = rows
        self.lengths_and_places.copy_(torch.tensor([[len(prompt) + 1 for prompt in prompts], places]))


class GraphRunner:
    """Replays steps, and the passes of few or short prompts. A graph belongs to the buffers it was captured over and
    is replayed by every run that borrows them.

    The key: batch size, N, P, the chooser's key, the tree that is drafted, whether scores are kept, whether branches
    are looked up, the cache bucket, and the width of the stop tokens. The model, its dtype, k and the ops are the
    engine's. Steps whose chooser needs the host run eagerly.
    """

    captures = True

    def prefill(self, step: Step, buffers: Buffers, prompts: list[Tensor], chunk_tokens: int | None) -> None:
        view = step.view

        def batch(prompts: list[Tensor], places: list[int]) -> None:
            shape = len(prompts), padded_length(max(map(len, prompts)))
            if shape[0] > CAPTURED_PROMPTS or shape[0] * shape[1] > CAPTURED_ROWS:
                prefill_batch(view, prompts, buffers.cache, places, default_chunk(view.device))
            else:
                self._replay_prompts(step, buffers, prompts, places, shape)

        # Modules of other libraries may wait for the host where rows are many, though they do not for those of a step.
        captured = chunk_tokens is None and view.only_known_modules
        prefill(view, prompts, buffers.cache, chunk_tokens, batch=batch if captured else None)

    def _replay_prompts(
        self, step: Step, buffers: Buffers, prompts: list[Tensor], places: list[int], shape: tuple[int, int]
    ) -> None:
        device = step.view.device
        if shape in buffers.prefills:
            buffers.prefills[shape].set_prompts(prompts, places)
            buffers.prefills[shape].graph.replay()
            return
        tokens, others = (torch.zeros(size, dtype=torch.int64, device=device) for size in (shape, (2, shape[0])))
        held = CapturedPrefill(torch.cuda.CUDAGraph(), tokens, others)
        held.set_prompts(prompts, places)

        def fill() -> None:
            lengths, places = held.lengths_and_places
            pass_chunk(step.view, held.tokens, lengths, PrefillAttention(buffers.cache, places, 0, None))

        # The pass that warms up fills the cache already.
        capture(buffers, held.graph, fill, fill)
        buffers.prefills[shape] = held

    def step(self, step: Step, state: DecodeState, choose: Chooser) -> StepRecord:
        if not choose.on_device:
            return step.run(state, choose)
        state.tree = self._static_tree(step, state)
        key = (
            *state.tree.tokens.shape, state.tree.size[1], choose.key, state.drafter and state.drafter.config,
            state.keeps_scores, state.history is not None, state.cache.shape[3], len(state.stop_tokens),
        )  # fmt: skip
        graphs = state.buffers.graphs
        if key not in graphs:
            graphs[key] = self._capture(step, state, choose)
        graph, record = graphs[key]
        graph.replay()
        return record

    def rows(self, step: Step, state: DecodeState, choose: Chooser) -> int:
        return step.rows(*(drafted_size(state) if choose.on_device else state.tree.size))

    def _static_tree(self, step: Step, state: DecodeState) -> DraftTree:
        """The state's tree in the buffers' own tensors, padded to the size that is drafted."""
        size, drafter = drafted_size(state), state.drafter
        trees, key = state.buffers.trees, (state.batch_size, *size)
        if key in trees and trees[key] is state.tree:
            return state.tree
        fits = all(own <= most for own, most in zip(state.tree.size, size, strict=True))
        # A graph drafts trees of the size it verifies: a larger tree is given up for its root.
        tree = (state.tree if fits else first_tree(state.tree.tokens[:, 0], drafter, padded=False)).padded(*size)
        if key not in trees:
            trees[key] = DraftTree(*(tensor.clone() for tensor in vars(tree).values()))
        trees[key].copy_(tree)
        return trees[key]

    def _capture(self, step: Step, state: DecodeState, choose: Chooser) -> tuple[torch.cuda.CUDAGraph, StepRecord]:
        """Capture a step. With every sequence frozen the warm-up changes nothing that is kept."""
        tree, finished, graph = state.tree, state.finished.clone(), torch.cuda.CUDAGraph()

        def warm_up() -> None:
            for _ in range(WARM_UP_STEPS):
                step.run(state, choose)
                state.tree = tree

        def work() -> StepRecord:
            record = step.run(state, choose)
            tree.copy_(state.tree)
            return record

        state.finished.fill_(True)
        record = capture(state.buffers, graph, warm_up, work)
        state.tree = tree
        state.finished.copy_(finished)
        return graph, record


def drafted_size(state: DecodeState) -> tuple[int, int]:
    """N and P of the tree that the state's drafter drafts: a captured step verifies a tree of this size."""
    if state.drafter is None:
        return 1, 0
    return state.drafter.config.num_nodes, state.drafter.config.num_lookahead


def capture(buffers: Buffers, graph: torch.cuda.CUDAGraph, warm_up: Callable[[], None], work: Callable[[], R]) -> R:
    """Warm up, then capture `work`, both on the stream of the buffers: what a library keeps per stream is made before
    the capture. Returns what `work` does, whose values a replay writes."""
    current = torch.cuda.current_stream()
    buffers.stream.wait_stream(current)
    with torch.cuda.stream(buffers.stream):
        warm_up()
    with torch.cuda.graph(graph, pool=buffers.pool, stream=buffers.stream, capture_error_mode="thread_local"):
        captured = work()
    current.wait_stream(buffers.stream)
    return captured


def make_runner(view: DecoderView, graphs: bool | None, impl: str | Mapping[str, str] | None) -> StepRunner:
    """The runner for an engine over `view`: graphs where they were asked for, or where nothing speaks against them.

    Raises:
        ValueError: graphs were asked for where they cannot be captured; says why.
    """
    obstacle = _obstacle(view, impl)
    if graphs and obstacle:
        raise ValueError(f"graphs: got True, but {obstacle}")
    use = obstacle is None if graphs is None else graphs
    return GraphRunner() if use else EagerRunner()


def _obstacle(view: DecoderView, impl: str | Mapping[str, str] | None) -> str | None:
    """Why steps cannot be captured here, or None."""
    if view.device.type != "cuda":
        return f"the model is on {view.device}, expected a CUDA device"
    if view.ranks.size > 1:
        return f"the model is sharded over {view.ranks.size} ranks, expected one process: collectives are not captured"
    if impl is not None:
        return f"the ops are those of {impl!r}, expected the owners on the device (impl None)"
    waiting = [name for name, waits in STEP_OPS.items() if waits and registry.owner(name, "cuda") == "reference"]
    if waiting:
        return f"the reference runs {', '.join(waiting)}, which waits for the device; see `firp doctor`"
    if _experts_wait(view):
        return (
            f"experts_implementation {view.config._experts_implementation!r} in {view.dtype} waits for the device "
            f"here, expected "
            "'batched_mm', or 'grouped_mm' in bfloat16 on a GPU of capability 9 or 10"
        )
    return None


def _experts_wait(view: DecoderView) -> bool:
    """Whether the host must know which experts a layer's rows take."""
    config = view.config
    if not (getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)):
        return False
    if config._experts_implementation != "grouped_mm":
        return config._experts_implementation != "batched_mm"
    return view.dtype != torch.bfloat16 or torch.cuda.get_device_capability(view.device)[0] not in GROUPED_MM
