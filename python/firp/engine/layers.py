"""One decoder layer of a decode step: eager, or compiled once for all layers."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TypeVar

import torch
from torch import Tensor, nn

from firp.decoder.attention import AttentionStep, RotatingStep
from firp.decoder.few_row_modules import JoinedLayers, joined
from firp.decoder.view import DecoderView
from firp.drafting.trees import DraftTree

# Graphs that one engine's layer may have: about six without a limit on batch sizes, and more where two sizes coincide.
MAX_GRAPHS = 256
# Runs of layers that one engine takes in one call: below the insertion layer, above it, and all.
RUNS = 3

R = TypeVar("R")


@dataclass(frozen=True)
class LayerFunction:
    """Takes rows through one layer, as `_layer` does but for the attention, which it holds.

    Attributes:
        whole: `firp_kernels.decoder_layers`, which takes them through a run of layers that are alike; or None.
        joined: the weights of such a run, kept from step to step.
    """

    call: Callable[..., Tensor]
    compiled: bool
    whole: Callable[..., Tensor] | None = None
    joined: Callable[[tuple[nn.Module, ...]], JoinedLayers | None] = joined

    def limits(self) -> AbstractContextManager:
        """What calls run in."""
        return compile_limits() if self.compiled else nullcontext()


def compile_limits() -> AbstractContextManager:
    """Past dynamo's own limit of 8 graphs a full graph raises, in the middle of a request."""
    return torch._dynamo.config.patch(recompile_limit=MAX_GRAPHS, accumulated_recompile_limit=8 * MAX_GRAPHS)


@dataclass
class TreeAttention(RotatingStep):
    """Attention of one layer's rows: write them after the context, then attend to context and tree."""

    attention: Callable[..., Tensor]
    layer_cache: Tensor
    context_lens: Tensor
    depths: Tensor
    ancestors: Tensor
    lookahead: Tensor
    num_offsets: int

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float, sliding_window: int | None
    ) -> Tensor:
        return self.attention(
            query, key, value, self.layer_cache, self.context_lens, self.depths, self.ancestors, self.lookahead,
            self.num_offsets, scale, sliding_window,
        )  # fmt: skip

    def rotate_and_attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float, sliding_window: int | None,
        rotary: tuple[Tensor, Tensor],
    ) -> Tensor:  # fmt: skip
        return self.attention(
            query, key, value, self.layer_cache, self.context_lens, self.depths, self.ancestors, self.lookahead,
            self.num_offsets, scale, sliding_window, *rotary,
        )  # fmt: skip


def _layer(
    layer: nn.Module,
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
    attention: Callable[..., Tensor],
    layer_cache: Tensor,
    context_lens: Tensor,
    depths: Tensor,
    ancestors: Tensor,
    lookahead: Tensor,
    num_offsets: int,
) -> Tensor:
    """Rows [B, R, d] through one layer view. Cache and tree come as arguments, so that all layers share one graph."""
    step: AttentionStep = TreeAttention(attention, layer_cache, context_lens, depths, ancestors, lookahead, num_offsets)
    return layer(hidden, attention_mask=None, position_embeddings=(cos, sin), firp_step=step)


def compiles(asked: bool | None, view: DecoderView, impl: str | Mapping[str, str] | None) -> bool:
    """Whether layers are compiled: where it was asked for, else on a GPU that holds the whole model.

    Raises:
        ValueError: asked for over a named implementation, which a compiler cannot look into, or over shards.
    """
    if asked and view.ranks.size > 1:
        raise ValueError(
            f"compile: got True with a model sharded over {view.ranks.size} ranks, expected False or None: layers with "
            "collectives are not compiled"
        )
    if asked and impl is not None:
        raise ValueError(
            f"compile: got True with impl {impl!r}, expected impl None: only torch's own dispatch is traced"
        )
    return view.device.type == "cuda" and impl is None and view.ranks.size == 1 if asked is None else asked


def compiled_copy(function: Callable[..., R]) -> Callable[..., R]:
    """`function`, compiled, with code and caches of its own.

    Dynamo keeps its caches at the code object, so engines that shared one would use up each other's recompile limit.
    """
    own = types.FunctionType(function.__code__.replace(), function.__globals__, f"firp_{function.__name__}")
    return torch.compile(own, fullgraph=True, dynamic=True)


def fused(function: Callable[..., R]) -> Callable[..., R]:
    """A function of a few rows, compiled into few kernels, with the limits that its calls run in."""
    compiled = compiled_copy(function)

    def call(*args: object) -> R:
        with compile_limits():
            return compiled(*args)

    return call


def layer_function(compiled: bool, ops: SimpleNamespace, device: torch.device, named: bool) -> LayerFunction:
    """The function that takes rows through one layer; compiled once for all layers.

    Args:
        named: whether implementations of ops were asked for by name, which `decoder_layers` does not ask.
    """
    function = compiled_copy(_layer) if compiled else _layer

    def call(layer: nn.Module, hidden: Tensor, cos: Tensor, sin: Tensor, *others: Tensor | int) -> Tensor:
        return function(layer, hidden, cos, sin, ops.write_and_attend, *others)

    whole = ops.decoder_layers if device.type == "cpu" and not compiled and not named else None
    return LayerFunction(call, compiled, whole, functools.lru_cache(RUNS)(joined))


def run_layers(
    function: LayerFunction,
    layers: list[nn.Module],
    hidden: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    cache: Tensor,
    context_lens: Tensor,
    tree: DraftTree,
    num_offsets: int,
) -> Tensor:
    """Rows [B, R, d] through `layers`, whose keys and values are those of `cache` [len(layers), 2, B, S, Hkv, D]."""
    cos, sin = position_embeddings
    if function.whole is not None and (together := function.joined(tuple(layers))) is not None:
        return function.whole(
            hidden, cos, sin, together.eps, *together.weights, cache, context_lens, tree.depths, tree.ancestors,
            tree.lookahead, num_offsets, together.scale, together.sliding_window,
        )  # fmt: skip
    with function.limits():
        for layer, layer_cache in zip(layers, cache.unbind(0), strict=True):
            hidden = function.call(
                layer,
                hidden,
                cos,
                sin,
                layer_cache,
                context_lens,
                tree.depths,
                tree.ancestors,
                tree.lookahead,
                num_offsets,
            )
    return hidden
