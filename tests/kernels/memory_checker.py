"""Memory faults and races of Triton kernels, found in Triton's interpreter.

Inside `checked()` a launch runs its programs in reversed order, a few at once, which change at each load and store. It
raises `KernelFault` for

- an address outside of the tensors that the launch was given: their elements, not the memory around them;
- a load of what nobody wrote, in a tensor that the launcher made;
- an address that one program stores to and another one loads or stores.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from interleaved import Programs
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

from firp_kernels.registry import TRITON_OPS
from firp_kernels.triton import attention_join

TOGETHER = 4
WITHOUT_VALUES = {
    f"aten::{name}" for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
}
ATOMICS = [name for name in dir(InterpreterBuilder) if name.startswith("create_atomic_")]


class KernelFault(AssertionError):
    """A kernel touched memory that it must not touch, or two of its programs the same memory."""


class Allocations(TorchDispatchMode):
    """Which bytes are written of the tensors that were made without values: by address of their storage."""

    def __init__(self) -> None:
        super().__init__()
        self.written: dict[int, np.ndarray] = {}
        self._alive: list[torch.Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tree_leaves(value):
                    self.written.pop(tensor.untyped_storage().data_ptr(), None)
        out = func(*args, **(kwargs or {}))
        if func._schema.name in WITHOUT_VALUES and out.numel():
            storage = out.untyped_storage()
            self.written[storage.data_ptr()] = np.zeros(storage.nbytes(), bool)
            self._alive.append(out)
        return out


class Region:
    """Memory of one tensor of a launch: addresses [low, high), and which bytes from `base` on are written, if any."""

    def __init__(self, tensor: torch.Tensor, allocations: Allocations) -> None:
        self.base = tensor.untyped_storage().data_ptr()
        self.low = tensor.data_ptr()
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self.high = self.low + (last + 1) * tensor.element_size()
        self.written = allocations.written.get(self.base)

    def holds_all(self, addresses: np.ndarray, size: int) -> bool:
        return self.low <= addresses.min() and addresses.max() + size <= self.high

    def holds(self, addresses: np.ndarray, size: int) -> np.ndarray:
        return (self.low <= addresses) & (addresses + size <= self.high)


class Launch:
    """What the programs of one launch load and store."""

    def __init__(self, name: str, tensors: list[torch.Tensor], allocations: Allocations) -> None:
        self.name = name
        self.regions = [Region(tensor, allocations) for tensor in tensors if tensor.numel()]
        self.faults: dict[str, int] = {}
        self.accesses: dict[str, list[tuple[int, np.ndarray]]] = {"load": [], "store": []}

    def access(self, kind: str, program: int, pointers: TensorHandle, mask: TensorHandle) -> TensorHandle:
        """Note an access; the mask of the lanes that may go on."""
        size = np.dtype(interpreter._get_np_dtype(pointers.get_element_ty())).itemsize
        lanes = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
        addresses = pointers.data[lanes].astype(np.int64)
        if not addresses.size:
            return mask
        inside = self._inside(kind, addresses, size)
        self.accesses[kind].append((program, addresses[inside]))
        if inside.all():
            return mask
        self._count(f"{kind} out of bounds", int((~inside).sum()))
        allowed = lanes.copy()
        allowed[lanes] = inside
        return TensorHandle(allowed, tl.int1)

    def _inside(self, kind: str, addresses: np.ndarray, size: int) -> np.ndarray:
        """Which addresses are of a tensor; bytes that are stored count as written from then on."""
        inside = np.zeros(addresses.size, bool)
        for region in self.regions:
            part = slice(None) if region.holds_all(addresses, size) else region.holds(addresses, size)
            inside[part] = True
            if region.written is not None:
                places = (addresses[part] - region.base)[:, None] + np.arange(size)
                if kind == "store":
                    region.written[places] = True
                elif not region.written[places].all():
                    self._count("load of what nobody wrote", int((~region.written[places].all(1)).sum()))
            if inside.all():
                break
        return inside

    def _count(self, fault: str, lanes: int) -> None:
        self.faults[fault] = self.faults.get(fault, 0) + lanes

    def finish(self) -> None:
        """Compare the programs' accesses, and raise KernelFault where there is any fault."""
        stored, writers = self._sorted("store")
        if stored.size:
            again = (stored[1:] == stored[:-1]) & (writers[1:] != writers[:-1])
            if again.any():
                self._count("stores of two programs to one address", int(again.sum()))
            loaded, readers = self._sorted("load")
            place = np.searchsorted(stored, loaded).clip(max=stored.size - 1)
            shared = (stored[place] == loaded) & (writers[place] != readers)
            if shared.any():
                self._count("loads of what another program stores", int(shared.sum()))
        if self.faults:
            raise KernelFault(
                f"{self.name}: " + ", ".join(f"{count} x {fault}" for fault, count in self.faults.items())
            )

    def _sorted(self, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """Addresses in order, and the programs they belong to."""
        noted = self.accesses[kind]
        addresses = np.concatenate([each for _, each in noted] or [np.zeros(0, np.int64)])
        programs = np.concatenate([np.full(each.size, program) for program, each in noted] or [np.zeros(0, np.int64)])
        order = np.argsort(addresses, kind="stable")
        return addresses[order], programs[order]


class Grid:
    """A kernel that runs all programs of its grid in one call."""

    def __init__(self, kernel: Callable, grid: tuple[int, ...], checker: Checker) -> None:
        self.kernel, self.grid, self.checker = kernel, (*grid, 1, 1)[:3], checker
        # What the interpreter reads of a function.
        self.__name__, self.__globals__, self.__signature__ = (
            kernel.__name__,
            kernel.__globals__,
            inspect.signature(kernel),
        )

    def __call__(self, **arguments: object) -> None:
        builder = interpreter.interpreter_builder
        builder.set_grid_dim(*self.grid)

        def program(place: tuple[int, ...]) -> None:
            builder.set_grid_idx(*place)
            self.kernel(**arguments)

        places = list(np.ndindex(*self.grid))[::-1]
        for first in range(0, len(places), TOGETHER):
            together = [functools.partial(program, place) for place in places[first : first + TOGETHER]]
            self.checker.programs = Programs(together)
            self.checker.programs.run()


class Checker:
    """What stands in for parts of the interpreter while `checked`.

    Attributes:
        launches: how many were checked.
    """

    def __init__(self) -> None:
        self.launches = 0
        self.allocations: Allocations | None = None
        self.launch: Launch | None = None
        self.programs: Programs | None = None

    def launcher(self, function: Callable) -> Callable:
        """The launcher, with note taken of the tensors that it makes."""

        @functools.wraps(function)
        def watched(*args: object) -> object:
            if self.allocations is not None:  # A part of another launcher.
                return function(*args)
            self.allocations = Allocations()
            try:
                with self.allocations:
                    return function(*args)
            finally:
                self.allocations = None

        return watched

    def executor(self, execute: Callable) -> Callable:
        """Runs the programs of a launch, and raises KernelFault at its end."""

        def run(executor: GridExecutor, *args: object, **keywords: object) -> None:
            tensors = [arg for arg in (*args, *keywords.values()) if isinstance(arg, torch.Tensor)]
            self.launch = launch = Launch(executor.fn.__name__, tensors, self.allocations or Allocations())
            self.launches += 1
            executor.fn, executor.grid = Grid(executor.fn, executor.grid, self), (1,)
            try:
                with _disable_current_modes():
                    execute(executor, *args, **keywords)
            finally:
                self.launch = None
                launch.finish()

        return run

    def memory_op(self, kind: str, op: Callable) -> Callable:
        """A load or store that lets other programs go on first, and leaves out lanes that are out of bounds."""

        def run(builder: InterpreterBuilder, pointers: TensorHandle, *args: object) -> TensorHandle | None:
            place = builder.grid_idx
            self.programs.pause()
            builder.set_grid_idx(*place)
            # mask, other, ... of a load; value, mask, ... of a store
            mask_at = 0 if kind == "load" else 1
            program = int(np.ravel_multi_index(place, builder.grid_dim))
            mask = self.launch.access(kind, program, pointers, args[mask_at])
            return op(builder, pointers, *args[:mask_at], mask, *args[mask_at + 1 :])

        return run


def unknown(op: Callable) -> Callable:
    def refuse(*args: object) -> None:
        raise NotImplementedError(f"{op.__name__}: the checker follows loads and stores alone")

    return refuse


@contextmanager
def checked() -> Iterator[Checker]:
    """Every launch of a Triton kernel inside is checked. Launchers of the package are followed in what they make."""
    checker = Checker()
    with ExitStack() as stack:

        def replace(owner: object, name: str, make: Callable) -> None:
            stack.enter_context(mock.patch.object(owner, name, make(getattr(owner, name))))

        replace(GridExecutor, "__call__", checker.executor)
        replace(InterpreterBuilder, "create_masked_load", functools.partial(checker.memory_op, "load"))
        replace(InterpreterBuilder, "create_masked_store", functools.partial(checker.memory_op, "store"))
        for name in ATOMICS:
            replace(InterpreterBuilder, name, unknown)
        # The join in place waits for other programs by a counter, which is not followed: a second launch joins.
        replace(attention_join, "IN_PLACE_BYTES", lambda _: -1)
        for name in TRITON_OPS:
            module = importlib.import_module(f"firp_kernels.triton.{name}")
            for launcher in TRITON_OPS:
                if hasattr(module, launcher):
                    replace(module, launcher, checker.launcher)
        yield checker
