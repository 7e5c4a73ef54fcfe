"""Which implementation runs an op on a device: one owner each, and others by name.

Owners: on a CPU the C++ extension where it is built and has the op, else the reference. On CUDA the Triton kernel, then
the extension, else the reference (torch ops run on any device).

An op is a module of `firp_kernels.ops`: SCHEMA, the public function, `fake`, `check` and `reference`. Two names are
optional. `fallback` is what an owner called "reference" runs, where the reference itself is written for reading only.
`RETURNS` is the named tuple of the results.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from firp_kernels.version import extension_name

NAMESPACE = "firp"
IMPLEMENTATIONS = ("reference", "triton", "extension")
TRITON_OPS = (
    "write_cache", "tree_attention", "write_and_attend", "predictor_projection", "verify_tree", "emit_tokens",
    "top_marginals", "condition_marginals", "keep_top_p", "lookup_branch",
)  # fmt: skip

_library = torch.library.Library(NAMESPACE, "DEF")
_ops: dict[str, ModuleType] = {}
_owners: dict[tuple[str, str], str] = {}


def load_extension() -> tuple[ModuleType | None, str | None]:
    """Return the module that was compiled for this torch, or None with the reason why there is none.

    One for another minor release of torch is not tried: its ABI differs, and the ops register as soon as it loads.
    """
    name, built = extension_name(torch.__version__), built_for()
    if not built:
        return None, "not built"
    if name not in built:
        return None, f"built for torch {' and '.join(built.values())}, found torch {torch.__version__}"
    try:
        return importlib.import_module(f"firp_kernels.{name}"), None
    except ImportError as error:
        return None, str(error)


def built_for() -> dict[str, str]:
    """{compiled module: minor release of torch that it is for}, such as {"_C_torch_2_13": "2.13"}."""
    names = sorted(path.name.partition(".")[0] for path in Path(__file__).parent.glob("_C_torch_*.so"))
    return {name: name.removeprefix("_C_torch_").replace("_", ".") for name in names}


def cpu_isa() -> str | None:
    """Instruction set of the CPU kernels: "portable", "avx2", "avx512" or "avx512bf16"; None without the extension.

    It is the best one of the processor, or what the environment variable FIRP_CPU_ISA caps it to.

    Raises:
        ValueError: FIRP_CPU_ISA is none of these.
    """
    extension, _ = load_extension()
    return None if extension is None else extension.build_info()["cpu_instructions"]


def _triton(name: str) -> Callable:
    """Launcher of a Triton kernel; Triton itself is imported on the first call."""

    def launch(*args: object) -> Any:
        return getattr(importlib.import_module(f"firp_kernels.triton.{name}"), name)(*args)

    return functools.wraps(_ops[name].reference)(launch)


def define(ops: dict[str, ModuleType]) -> None:
    """Define every op and give each device its owner."""
    _ops.update(ops)
    for name, op in ops.items():
        _library.define(name + op.SCHEMA)
        torch.library.register_fake(f"{NAMESPACE}::{name}", op.fake, lib=_library)
    extension, reason = load_extension()
    if extension is None and built_for():
        warnings.warn(
            f"the C++ extension of firp_kernels is not used, and ops on a CPU are slower: {reason}; see `firp doctor`",
            stacklevel=2,
        )
    built = extension.registered_ops() if extension is not None else {}
    has_triton = importlib.util.find_spec("triton") is not None
    for name, op in ops.items():
        for device, key in (("cpu", "CPU"), ("cuda", "CUDA")):
            if name in built.get(device, ()):
                _owners[name, device] = "extension"
            elif device == "cuda" and has_triton and name in TRITON_OPS:
                _library.impl(name, _triton(name), key)
                _owners[name, device] = "triton"
            else:
                _library.impl(name, getattr(op, "fallback", op.reference), key)
                _owners[name, device] = "reference"


def owner(name: str, device: str) -> str:
    """Implementation that runs op `name` on device type `device` ("cpu" or "cuda")."""
    return _owners[name, device]


def check_impl(impl: str | None) -> None:
    if impl is not None and impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: got {impl!r}, expected one of {', '.join(IMPLEMENTATIONS)}")


@functools.cache
def bound(name: str, impl: str | None) -> Callable:
    """The function that runs op `name` as `impl`; None is torch's dispatcher."""
    check_impl(impl)
    dispatched = getattr(getattr(torch.ops, NAMESPACE), name).default
    if impl is None:
        return _with_names(name, dispatched)
    if impl == "reference":
        return _ops[name].reference
    if impl == "triton":
        if name not in TRITON_OPS:
            raise ValueError(f"impl: op {name!r} has no 'triton' implementation")
        return _triton(name)

    def extension(*args: object) -> Any:
        device = next(arg.device.type for arg in args if isinstance(arg, torch.Tensor))
        if _owners.get((name, device)) != "extension":
            raise RuntimeError(f"impl: the extension has no {name!r} for {device}; see `firp doctor`")
        return dispatched(*args)

    return _with_names(name, extension)


def _with_names(name: str, function: Callable) -> Callable:
    """What comes from torch's dispatcher is a plain tuple; it gets the names of the op's results."""
    returns = getattr(_ops[name], "RETURNS", None)
    return function if returns is None else lambda *args: returns(*function(*args))


def call(name: str, impl: str | None, *args: object) -> Any:
    return bound(name, impl)(*args)


def bind(impl: str | Mapping[str, str] | None) -> SimpleNamespace:
    """All ops as attributes of one object, each with the implementation that was asked for.

    Args:
        impl: one for every op, or one for each op named in a mapping (`{"tree_attention": "triton"}`). None, and an op
            that is not named, takes the owner for the tensors' device. `write_and_attend` is made of the bound
            `write_cache` and `tree_attention` where one of these is named and it is not.

    Raises:
        ValueError: an unknown op or implementation, or an op that has no such implementation.
    """
    chosen = impl if isinstance(impl, Mapping) else dict.fromkeys(_ops, impl)
    if unknown := sorted(chosen.keys() - _ops.keys()):
        raise ValueError(f"impl: got op {unknown[0]!r}, expected one of {', '.join(_ops)}")
    ops = SimpleNamespace(**{name: bound(name, chosen.get(name)) for name in _ops})
    whole = _ops["write_and_attend"]
    if "write_and_attend" not in chosen and chosen.keys() & set(whole.PARTS):
        ops.write_and_attend = functools.partial(whole.composed, ops)
    return ops
