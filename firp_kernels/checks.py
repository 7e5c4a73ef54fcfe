"""Helpers of the ops' argument checks: one error that names the argument, what it got and what was expected."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_NODES = 256


def shape(name: str, tensor: Tensor, *expected: int | None) -> None:
    """`expected`: the size of each dimension, None for any."""
    wrong = len(expected) != tensor.dim()
    if wrong or any(e is not None and e != s for e, s in zip(expected, tensor.shape, strict=True)):
        wanted = ", ".join("*" if e is None else str(e) for e in expected)
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected [{wanted}]")


def last_dimension(name: str, tensor: Tensor, size: int) -> None:
    if tensor.dim() < 1 or tensor.shape[-1] != size:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected last dimension {size}")


def dtype(name: str, tensor: Tensor, *expected: torch.dtype) -> None:
    if tensor.dtype not in expected:
        raise TypeError(f"{name}: got dtype {tensor.dtype}, expected {' or '.join(str(e) for e in expected)}")


def same_device(**tensors: Tensor | None) -> None:
    """All tensors are on the device of the first; None is an argument that was not given."""
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first = next(iter(present))
    for name, tensor in present.items():
        if tensor.device != present[first].device:
            raise ValueError(f"{name}: is on {tensor.device}, expected {present[first].device} (as {first})")


def on_cpu(tensor: Tensor) -> bool:
    """Values are checked on the CPU only; elsewhere reading them would stall the device."""
    return tensor.device.type == "cpu" and not isinstance(tensor, torch._subclasses.FakeTensor)


def between(name: str, tensor: Tensor, low: int, high: int) -> None:
    """Every value is in low..high."""
    if on_cpu(tensor) and tensor.numel():
        least, most = int(tensor.min()), int(tensor.max())
        if least < low or most > high:
            raise ValueError(f"{name}: got {least}..{most}, expected {low}..{high}")


def room(context_lens: Tensor, rows: int, capacity: int) -> None:
    """The cache holds every context and `rows` more."""
    if on_cpu(context_lens) and context_lens.numel():
        low, high = int(context_lens.min()), int(context_lens.max())
        if low < 0:
            raise ValueError(f"context_lens: got {low}, expected at least 0")
        if high + rows > capacity:
            raise ValueError(f"context_lens: {high} + {rows} rows exceed the cache capacity of {capacity} slots")


def some_marginals(probabilities: Tensor) -> None:
    """`probabilities` [B, k, ..., ranks] has an offset and a rank."""
    offsets, ranks = probabilities.shape[1], probabilities.shape[-1]
    if offsets < 1 or ranks < 1:
        raise ValueError(f"probabilities: got {offsets} offsets and {ranks} ranks, expected at least one of each")


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype that the references compute in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
