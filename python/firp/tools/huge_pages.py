"""Weights in huge pages. A decode step on a CPU reads every weight once, and in pages of 4 KiB half a million addresses
have to be looked up for that.
"""

from __future__ import annotations

import mmap
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from firp.tools.hardware import available_memory

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
PAGE, ALIGNMENT = 2 << 20, 64


def gives_huge_pages() -> bool:
    """Whether the system gives them to a process that asks."""
    try:
        return hasattr(mmap, "MADV_HUGEPAGE") and "[never]" not in SETTING.read_text()
    except OSError:
        return False


@torch.no_grad()
def use_huge_pages(model: nn.Module) -> bool:
    """Move the parameters of a model that is on a CPU, each to a storage of its own; values and ties stay.

    Returns:
        False where the system has no huge pages, or no memory for a second copy; where parameters overlap, or are of a
        class of their own; then nothing has changed.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.numel()]
    sizes = [-(-parameter.nbytes // ALIGNMENT) * ALIGNMENT for parameter in parameters]
    total = (2 + sum(sizes) // PAGE) * PAGE
    plain = all(
        type(parameter) is nn.Parameter and parameter.device.type == "cpu" and parameter.is_contiguous()
        for parameter in parameters
    )
    if not parameters or not plain or not gives_huge_pages() or available_memory("cpu") < 2 * total:
        return False
    spans = sorted((parameter.data_ptr(), parameter.nbytes) for parameter in parameters)
    if any(begin + size > after for (begin, size), (after, _) in pairwise(spans)):
        return False
    pages = mmap.mmap(-1, total, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    place = -torch.frombuffer(pages, dtype=torch.uint8).data_ptr() % PAGE
    for parameter, size in zip(parameters, sizes, strict=True):
        moved = torch.frombuffer(pages, dtype=parameter.dtype, count=parameter.numel(), offset=place)
        parameter.data = moved.view(parameter.shape).copy_(parameter)
        place += size
    return True
