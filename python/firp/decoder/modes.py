"""The grad mode and the current device that decoding runs in, for any of the caller's."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import torch

from firp.decoder.view import DecoderView

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


def current(device: torch.device) -> contextlib.AbstractContextManager:
    """Make a GPU the current one: streams, events and captures are made on the current device. Elsewhere nothing."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class HasView(Protocol):
    """What has a view of a model, on one device."""

    view: DecoderView


S = TypeVar("S", bound=HasView)


def on_own_device(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Run a method of an object that has a `view` with the view's device current."""

    @functools.wraps(method)
    def wrapper(self: S, *args: P.args, **kwargs: P.kwargs) -> R:
        with current(self.view.device):
            return method(self, *args, **kwargs)

    return wrapper
