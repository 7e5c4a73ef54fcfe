"""Which implementation serves which op on which device: one owner each, and others by name.

Owners: on a CPU the C++ extension where it is built and has the op, else the reference. On CUDA the Triton kernel, the
extension for pointer work, else the reference (torch ops run on any device).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable

import torch

from firp_kernels import reference

NAMESPACE = "firp"
IMPLEMENTATIONS = ("reference", "triton", "extension")
TRITON_OPS = ("write_cache", "tree_attention", "predictor_projection", "verify_tree", "condition_marginals")

_library = torch.library.Library(NAMESPACE, "DEF")
_owners: dict[tuple[str, str], str] = {}


def load_extension():
    """Return the compiled module `firp_kernels._C`, or None with the reason it cannot be loaded."""
    try:
        return importlib.import_module("firp_kernels._C"), None
    except ImportError as error:
        return None, str(error)


def _triton(name: str) -> Callable:
    """Launcher of a Triton kernel; Triton itself is imported on the first call."""

    def launch(*args):
        return getattr(importlib.import_module(f"firp_kernels.triton.{name}"), name)(*args)

    return functools.wraps(getattr(reference, name))(launch)


def define(schemas: dict[str, tuple[str, Callable]]) -> None:
    """Define every op and give each device its owner."""
    for name, (schema, fake) in schemas.items():
        _library.define(name + schema)
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    extension, _ = load_extension()
    built = extension.registered_ops() if extension is not None else {}
    has_triton = importlib.util.find_spec("triton") is not None
    for name in schemas:
        for device, key in (("cpu", "CPU"), ("cuda", "CUDA")):
            if name in built.get(device, ()):
                _owners[name, device] = "extension"
            elif device == "cuda" and has_triton and name in TRITON_OPS:
                _library.impl(name, _triton(name), key)
                _owners[name, device] = "triton"
            else:
                _library.impl(name, getattr(reference, name), key)
                _owners[name, device] = "reference"


def owner(name: str, device: str) -> str:
    """Implementation that serves op `name` on device type `device` ("cpu" or "cuda")."""
    return _owners[name, device]


def check_impl(impl: str | None) -> None:
    if impl is not None and impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: got {impl!r}, expected one of {', '.join(IMPLEMENTATIONS)}")


@functools.cache
def bound(name: str, impl: str | None) -> Callable:
    """The callable behind op `name` for `impl`; None is torch's dispatcher."""
    check_impl(impl)
    dispatched = getattr(getattr(torch.ops, NAMESPACE), name).default
    if impl is None:
        return dispatched
    if impl == "reference":
        return getattr(reference, name)
    if impl == "triton":
        if name not in TRITON_OPS:
            raise ValueError(f"impl: op {name!r} has no 'triton' implementation")
        return _triton(name)

    def extension(*args):
        device = next(arg.device.type for arg in args if isinstance(arg, torch.Tensor))
        if _owners.get((name, device)) != "extension":
            raise RuntimeError(f"impl: the extension has no {name!r} for {device}; see `firp doctor`")
        return dispatched(*args)

    return extension


def call(name: str, impl: str | None, *args):
    return bound(name, impl)(*args)
