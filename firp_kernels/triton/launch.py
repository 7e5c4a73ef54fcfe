"""What every launcher needs: the device's architecture, a guard that makes it current, a refusal of what cannot run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
# The interpreter takes the configurations of an H100.
INTERPRETED_CAPABILITY, INTERPRETED_MULTIPROCESSORS = 90, 132
TYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}


@contextmanager
def on_device_of(name: str, tensor: Tensor, kernel, dtypes: tuple[torch.dtype, ...] = FLOATS) -> Iterator[int]:
    """Make the device of `tensor` (the argument called `name`) current; yields its capability, e.g. 90 for sm_90.

    Raises:
        TypeError: a dtype that the kernel does not take.
        ValueError: a tensor on a CPU, unless `kernel` was imported under TRITON_INTERPRET=1.
    """
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: got dtype {tensor.dtype}, expected {' or '.join(str(dtype) for dtype in dtypes)}")
    if tensor.is_cuda:
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
    if tensor.is_cuda:
        return torch.cuda.get_device_properties(tensor.device).multi_processor_count
    return INTERPRETED_MULTIPROCESSORS
