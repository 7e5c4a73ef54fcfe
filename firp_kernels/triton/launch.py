"""What every launcher needs: a device guard, the limits of an architecture, the form of a launch's configuration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
# The interpreter takes the configurations of an H100.
INTERPRETED_CAPABILITY = 90
# Of the data centre GPU of an architecture, where no device says it.
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
# The architecture that launches are recorded for (`firp_kernels.triton.variants`), on any device.
recorded_capability: ContextVar[int | None] = ContextVar("recorded_capability", default=None)
TYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
# Bytes of shared memory that a program may use. Architectures that are not listed have at least what sm_86 has.
SHARED_MEMORY = {80: 166_912, 87: 166_912, 90: 232_448, 100: 232_448, 103: 232_448}
LEAST_SHARED_MEMORY = 101_376


@dataclass(frozen=True)
class LaunchConfig:
    """How a kernel is launched.

    Attributes:
        tile: the constexprs that give the size of a program's tile.
        num_warps, num_stages: warps of a program; stages of its pipelined loops.
        fp_fusion: whether multiply-adds may contract, stated because the default differs between versions of Triton.
    """

    tile: dict[str, int]
    num_warps: int
    num_stages: int = 3
    fp_fusion: bool = True

    @property
    def options(self) -> dict[str, object]:
        """The launch options that are no arguments of the kernel."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": self.fp_fusion}

    @property
    def keywords(self) -> dict[str, object]:
        return self.tile | self.options


def shared_memory(capability: int) -> int:
    """Bytes of shared memory that a program may use on an architecture, e.g. 90 for sm_90."""
    return SHARED_MEMORY.get(capability, LEAST_SHARED_MEMORY)


@contextmanager
def on_device_of(name: str, tensor: Tensor, kernel, dtypes: tuple[torch.dtype, ...] = FLOATS) -> Iterator[int]:
    """Make the device of `tensor` (the argument called `name`) current; yields its capability, e.g. 90 for sm_90.

    Raises:
        TypeError: a dtype that the kernel does not take.
        ValueError: a tensor on a CPU, unless `kernel` was imported under TRITON_INTERPRET=1.
    """
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: got dtype {tensor.dtype}, expected {' or '.join(str(dtype) for dtype in dtypes)}")
    if (recorded := recorded_capability.get()) is not None:
        yield recorded
    elif tensor.is_cuda:
        with torch.cuda.device(tensor.device):
            major, minor = torch.cuda.get_device_capability()
            yield 10 * major + minor
    elif isinstance(kernel, JITFunction):
        raise ValueError(
            f"{name}: is on {tensor.device}, expected a CUDA device; on a CPU Triton kernels run only in Triton's "
            "interpreter (TRITON_INTERPRET=1, set before the first import of triton)"
        )
    else:
        yield INTERPRETED_CAPABILITY


def multiprocessors(tensor: Tensor) -> int:
    """Number of multiprocessors of the tensor's device."""
    recorded = recorded_capability.get()
    if tensor.is_cuda and recorded is None:
        return torch.cuda.get_device_properties(tensor.device).multi_processor_count
    return MULTIPROCESSORS[recorded or INTERPRETED_CAPABILITY]


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor without values, for a launcher that is recorded."""
    return torch.empty(shape, dtype=dtype, device="meta")
