"""The machine: its name, its memory bandwidth, and waiting for it."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

import firp_kernels

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}
PRODUCT_WIDTH = {"cuda": 8192, "cpu": 1024}


def device_name(device: torch.device | str) -> str:
    """Name of the GPU, or of the CPU this process runs on."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return _cpu_info().get("model name") or platform.processor() or platform.machine()


@functools.cache
def _cpu_info() -> dict[str, str]:
    """What Linux tells of the first processor; empty elsewhere."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}


def machine_name(device: torch.device | str, dtype: torch.dtype) -> str:
    """All that the time of a step depends on beside the model, in words.

    A GPU's name, capability and multiprocessors; a CPU's name, family, model, stepping, instruction set and threads;
    the dtype, and the versions of torch, Triton and this package.
    """
    parts = [device_name(device)]
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        parts += [f"capability {properties.major}.{properties.minor}"]
        parts += [f"{properties.multi_processor_count} multiprocessors", f"triton {_version('triton')}"]
    else:
        told = {"family": "cpu family", "model": "model", "stepping": "stepping"}
        parts += [f"{name} {_cpu_info()[field]}" for name, field in told.items() if field in _cpu_info()]
        parts += [firp_kernels.cpu_isa() or "no extension", f"{torch.get_num_threads()} threads"]
    parts += [str(dtype).removeprefix("torch."), f"torch {torch.__version__}"]
    return ", ".join([*parts, f"firp_kernels {firp_kernels.__version__}"])


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def available_memory(device: torch.device | str) -> int:
    """Bytes that may still be allocated on the device; on a GPU with the blocks that torch holds unused.

    On a CPU the ranks that torchrun started on this machine share them.
    """
    if torch.device(device).type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
    except (OSError, StopIteration):
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return free // max(int(os.environ.get("LOCAL_WORLD_SIZE") or 1), 1)


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def preemptions() -> int:
    """Times that other work took a core from this process's threads so far; 0 where the system does not tell."""
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the host or on a GPU; torch's allocator for CPUs raises a plain RuntimeError."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def synchronize(device: torch.device | str) -> None:
    """Wait until the device has finished its work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def copy_bandwidth(device: torch.device | str, repeats: int = 5) -> float:
    """Bytes per second of the best of several large copies; a byte read and a byte written count as two."""
    source = torch.ones(COPY_BYTES[torch.device(device).type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _least_seconds(lambda: target.copy_(source), device, repeats)


def product_rate(device: torch.device | str, dtype: torch.dtype, repeats: int = 5) -> float:
    """Operations per second of the best of several products of large square matrices."""
    width = PRODUCT_WIDTH[torch.device(device).type]
    matrix = torch.ones(width, width, dtype=dtype, device=device)
    out = torch.empty_like(matrix)
    return 2 * width**3 / _least_seconds(lambda: torch.matmul(matrix, matrix, out=out), device, repeats)


def _least_seconds(work: Callable[[], object], device: torch.device | str, repeats: int) -> float:
    """Of several runs after a first one."""
    best = float("inf")
    for _ in range(repeats + 1):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best
