"""Which variants launchers ask for, found without a device: Triton's own binder says what it would compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction, KernelInterface

from firp_kernels.triton.launch import TYPE_NAMES, recorded_capability


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel, in Triton's own terms.

    Attributes:
        kernel: the `@triton.jit` function.
        signature: type of each argument: "*bf16", "i32", "constexpr", ...
        constants: path of an argument -> its value, for constexprs and what Triton takes for one (1, None).
        attributes: path of an argument -> what its value is divisible by.
        options: num_warps, num_stages, enable_fp_fusion, as given at the launch.
    """

    kernel: JITFunction
    signature: Mapping[str, str]
    constants: Mapping[tuple, object]
    attributes: Mapping[tuple, list]
    options: Mapping[str, object]

    @property
    def tile(self) -> dict[str, Any]:
        """The constexprs of the kernel by name."""
        names = {path: self.kernel.arg_names[path[0]] for path in self.constants}
        return {names[path]: value for path, value in self.constants.items() if names[path].isupper()}

    @property
    def name(self) -> str:
        """Float types of the pointers and values of the constexprs, e.g. "bf16 HEAD_DIM=128 BLOCK_N=64"."""
        pointers = dict.fromkeys(type[1:] for type in self.signature.values() if type[1:] in TYPE_NAMES.values())
        return " ".join([*pointers, *(f"{name}={value}" for name, value in self.tile.items() if value)])


class Address:
    """What the binder reads of a tensor: its dtype, and its address in memory that begins at a multiple of 16."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype, self._offset = tensor.dtype, tensor.storage_offset() * tensor.element_size()

    def data_ptr(self) -> int:
        return self._offset


class NoDevice:
    """Triton's driver of a GPU that is not there, numbered by its architecture."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


@contextmanager
def without_device(capability: int) -> Iterator[list[CompiledKernel]]:
    """Launches take tensors of any device, also fake ones, and run nothing: the kernels that they compile are listed.

    Args:
        capability: architecture that the launchers see and compile for, e.g. 90 for sm_90.
    """
    launched: list[CompiledKernel] = []

    def subscript(kernel: JITFunction, grid: tuple[int, ...]) -> Callable:
        def launch(*args: object, **keywords: object) -> None:
            addresses = (Address(arg) if isinstance(arg, Tensor) else arg for arg in args)
            launched.append(kernel.run(*addresses, grid=grid, warmup=True, **keywords))

        return launch

    token, before = recorded_capability.set(capability), KernelInterface.__getitem__
    driver.set_active(NoDevice(capability))
    KernelInterface.__getitem__ = subscript
    try:
        yield launched
    finally:
        KernelInterface.__getitem__ = before
        # Not `reset_active`, which asks for a driver at once and fails where there is none.
        driver._active = None
        recorded_capability.reset(token)


@contextmanager
def recorded(capability: int) -> Iterator[dict[str, Variant]]:
    """Launches inside compile and run nothing: the variants that they ask for are listed, by Triton's key."""
    found: dict[str, Variant] = {}

    def note(*, fn, compile, **_: object) -> bool:
        options = {name: compile[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
        (attributes,) = compile["configs"]
        variant = Variant(fn.jit_function, compile["signature"], compile["constants"], attributes, options)
        found.setdefault(f"{fn.name} {compile['key']}", variant)
        return True

    before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, note
    try:
        with without_device(capability):
            yield found
    finally:
        knobs.runtime.jit_cache_hook = before
