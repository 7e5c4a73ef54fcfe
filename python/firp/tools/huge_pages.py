"""Weights in huge pages. A decode step on a CPU reads every weight once; with pages of 4 KiB it has to look up an
address for every 4 KiB of them.
"""

from __future__ import annotations

import ctypes
import mmap
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from firp.tools.hardware import available_memory

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
CONTAINER = Path("/sys/fs/cgroup")
PAGE, ALIGNMENT = 2 << 20, 64
# Smaller parameters stay where they are: one that is kept would keep the others of its mapping.
SMALLEST = 64 << 10
# A mapping is given back when all its parameters are gone, so there are several.
MAPPING = 32 << 20


def gives_huge_pages() -> bool:
    """Whether the system gives them to a process that asks."""
    try:
        return hasattr(mmap, "MADV_HUGEPAGE") and "[never]" not in SETTING.read_text()
    except OSError:
        return False


@torch.no_grad()
def use_huge_pages(model: nn.Module) -> bool:
    """Move the larger parameters of a model that is on a CPU, each to a storage of its own; values and ties stay.

    Returns:
        Whether all were moved. None is where the system has no huge pages, or less memory than twice the weights; where
        parameters overlap, or are of a class of their own.
    """
    parameters = list(model.parameters())
    plain = all(
        type(parameter) is nn.Parameter
        and parameter.layout is torch.strided
        and parameter.device.type == "cpu"
        and parameter.is_contiguous()
        for parameter in parameters
    )
    if not plain or not gives_huge_pages():
        return False
    large = [parameter for parameter in parameters if parameter.nbytes >= SMALLEST]
    spans = sorted((parameter.data_ptr(), parameter.nbytes) for parameter in parameters if parameter.nbytes)
    overlap = any(begin + size > after for (begin, size), (after, _) in pairwise(spans))
    if not large or overlap or _free_memory() < 2 * sum(parameter.nbytes for parameter in large):
        return False
    try:
        for together in _mappings(large):
            _move(together)
    except (OSError, ValueError):  # no more mappings, or no advice: what was moved stays so
        return False
    finally:
        _give_back()
    return True


def _free_memory() -> float:
    """Bytes; in a container at most those up to its limit, which counts what it read of files as used."""
    try:
        most, used = (int((CONTAINER / name).read_text()) for name in ("memory.max", "memory.current"))
        return min(available_memory("cpu"), most - used)
    except (OSError, ValueError):  # no container, or "max"
        return available_memory("cpu")


def _mappings(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters in their order, by what shares a mapping."""
    groups: list[list[nn.Parameter]] = [[]]
    for parameter in parameters:
        if sum(other.nbytes for other in groups[-1]) >= MAPPING:
            groups.append([])
        groups[-1].append(parameter)
    return groups


def _move(parameters: list[nn.Parameter]) -> None:
    sizes = [-(-parameter.nbytes // ALIGNMENT) * ALIGNMENT for parameter in parameters]
    pages = mmap.mmap(-1, (2 + sum(sizes) // PAGE) * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    place = -torch.frombuffer(pages, dtype=torch.uint8).data_ptr() % PAGE
    for parameter, size in zip(parameters, sizes, strict=True):
        moved = torch.frombuffer(pages, dtype=parameter.dtype, count=parameter.numel(), offset=place)
        parameter.data = moved.view(parameter.shape).copy_(parameter)
        place += size


def _give_back() -> None:
    """Let the C library return what the first copies took."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
