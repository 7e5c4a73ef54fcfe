"""The grad mode that decoding runs in, whatever the caller's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def plain_tensors(function: Callable[P, R]) -> Callable[P, R]:
    """Run `function` without gradients and outside inference mode.

    What an engine keeps is written again by later calls. A tensor made in `torch.inference_mode()` could not be written
    outside of it.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return wrapper
