"""One thing to measure: an op on given inputs, what it must move and compute, and what a user would write instead."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.shapes import Tree
from firp_kernels.ops import draft_tree

Call = Callable[[], object]
# Largest error of a computed float, in parts of the largest exact value: two roundings in 16 bits, sums in float32.
BOUNDS = {torch.float32: 2.0**-17, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}

# Different drafts of a tree and a vocabulary: making 64 of them for every op would take longer than the measurement.
DRAFTS = 4


def results(args: tuple, returned) -> tuple[Tensor, ...]:
    """What is compared for an op that returns its results."""
    return returned if isinstance(returned, tuple) else (returned,)


@dataclass(frozen=True)
class Alternative:
    """What a user would write instead of the op.

    prepare(args) does off the clock what may be done once per tree or model, and returns the call that is timed.
    outcome(args, returned) gives tensors to compare with the first outcomes of the op; None where nothing can be
    compared: a floor that does less, or a draw of its own. scope is entered around timed calls. Without `capturable`
    the call reads the device from the host, so on CUDA it is timed as it runs and not in a graph.
    """

    prepare: Callable[[tuple], Call]
    outcome: Callable[[tuple, object], tuple[Tensor, ...]] | None = results
    scope: Callable[[], AbstractContextManager] = nullcontext
    capturable: bool = True
    floor: bool = False
    unavailable: str | None = None


@dataclass(frozen=True)
class Case:
    """An op on one kind of input.

    make(seed) returns the op's arguments. outcome(args, returned) is what is compared: for an op that works in place,
    the tensors it wrote. bound is the largest error of a float result, in parts of the largest exact value; None asks
    for equality. reset(args) undoes what keeps a second call from doing the same work; None where nothing does.
    num_bytes and operations are the least that any implementation must move and compute.
    """

    op: str
    variant: str
    shape: str
    tree: Tree
    context: int | None
    dtype: torch.dtype
    make: Callable[[int], tuple]
    num_bytes: int
    operations: int = 0
    bound: float | None = None
    alternatives: dict[str, Alternative] = field(default_factory=dict)
    outcome: Callable[[tuple, object], tuple[Tensor, ...]] = results
    reset: Callable[[tuple], None] | None = None

    @property
    def label(self) -> str:
        """What distinguishes this case from the op's others."""
        rows = "1 row" if self.tree.rows == 1 else f"{self.tree.rows} rows ({self.tree.num_nodes} nodes)"
        context = "" if self.context is None else f"context {self.context}"
        parts = self.variant, self.shape, rows, context, str(self.dtype).removeprefix("torch.")
        return ", ".join(part for part in parts if part)


def normal(device: str, dtype: torch.dtype, seed: int) -> Callable[..., Tensor]:
    """normal(*shape): standard normal tensors from one seeded generator on the device."""
    generator = torch.Generator(device).manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, device=device).to(dtype)


def drafted(tree: Tree, vocabulary: int, device: str, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A tree as the engine drafts it, one sequence: tokens, parents, depths, ancestors, lookahead."""
    made = _drafted_on_cpu(tree, vocabulary, seed % DRAFTS)
    *nodes, lookahead = (part.to(device, copy=True) for part in made)
    return *nodes, lookahead[:, : tree.num_lookahead]


def draft_inputs(tree: Tree, vocabulary: int, device: str, seed: int) -> tuple:
    """Arguments of `draft_tree`: as many ranked marginals as the tree has nodes, so that no node is padding."""
    made = _draft_inputs_on_cpu(tree, vocabulary, seed % DRAFTS)
    return *(part.to(device, copy=True) for part in made), tree.num_nodes, max(tree.num_lookahead, 1)


@functools.cache
def _drafted_on_cpu(tree: Tree, vocabulary: int, seed: int) -> tuple[Tensor, ...]:
    return draft_tree.reference(*draft_inputs(tree, vocabulary, "cpu", seed))


@functools.cache
def _draft_inputs_on_cpu(tree: Tree, vocabulary: int, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, tree.num_offsets, vocabulary, generator=generator) * 3
    top = logits.softmax(-1).topk(min(max(tree.num_nodes, 4), vocabulary), -1)
    root = torch.randint(vocabulary, (1,), generator=generator)
    return top.values, top.indices, root, torch.full((1,), tree.num_offsets, dtype=torch.int32)


def tensors_of(args: tuple) -> list[Tensor]:
    """The tensors among an op's arguments, those in lists included."""
    return [part for arg in args for part in (arg if isinstance(arg, list) else [arg]) if isinstance(part, Tensor)]


def with_tensors(args: tuple, change: Callable[[Tensor], Tensor]) -> tuple:
    """An op's arguments with every tensor changed, those in lists included."""

    def changed(arg):
        if isinstance(arg, list):
            return [changed(part) for part in arg]
        return change(arg) if isinstance(arg, Tensor) else arg

    return tuple(changed(arg) for arg in args)


def integers(device: str, *values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def num_bytes(*tensors: Tensor | None) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
