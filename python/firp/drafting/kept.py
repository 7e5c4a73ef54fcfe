"""What is derived of a model's and a predictor's tensors: made once, and found again while they stay as they are."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn
from torch._subclasses import FakeTensor

from firp.decoder.modes import plain_tensors
from firp.decoder.sharding import local

T = TypeVar("T")


@dataclass(frozen=True)
class _Made:
    tensors: tuple[weakref.ref, ...]
    state: tuple
    value: Any


# By a module of the model: what was made dies with it, and with any of the tensors.
_made: weakref.WeakKeyDictionary[nn.Module, dict[str, _Made]] = weakref.WeakKeyDictionary()


def kept(module: nn.Module, name: str, tensors: Iterable[Tensor], settings: tuple, make: Callable[[], T]) -> T:
    """`make()`, or what it made for the same module and name before, if nothing that it depends on has changed.

    Args:
        module: of the base model; what was made lives as long, and as long as the tensors.
        tensors: what `make` reads: other tensors, or one that was written to since, make it again.
        settings: what else decides the result.
    """
    tensors = tuple(tensors)
    # Which do not tell whether they were written to.
    if any(tensor.is_inference() or isinstance(tensor, FakeTensor) for tensor in tensors):
        return plain_tensors(make)()
    state = *settings, *((local(tensor).data_ptr(), tensor._version) for tensor in tensors)
    by_name = _made.setdefault(module, {})
    found = by_name.get(name)
    same = found is not None and found.state == state and len(found.tensors) == len(tensors)
    if found is None or not same or any(r() is not t for r, t in zip(found.tensors, tensors, strict=True)):
        value = plain_tensors(make)()
        found = by_name[name] = _Made(
            tuple(weakref.ref(t, lambda _: by_name.pop(name, None)) for t in tensors), state, value
        )
    return found.value
