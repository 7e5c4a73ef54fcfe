"""Whether a library's functions are still those that its files define.

Packages for long context, for kernels or for tracing replace methods and functions of transformers and torch while
they run. FIRP rebuilds a model's forward from its parts, so it has to know that Hugging Face would run those parts.
The originals are the code objects of the library's files on disk: a replacement made before this package was imported
shows up as well. Files are read once; later calls compare identities.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import is_

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

LIBRARIES = ("transformers", "torch", "peft")
# Where the libraries' decorators come from.
DECORATORS = (*LIBRARIES, "contextlib", "functools", "huggingface_hub")
# Names of a class body that are no behaviour.
_NOT_BEHAVIOUR = frozenset(["__module__", "__qualname__", "__doc__", "__annotations__", "__dict__", "__weakref__",
"__init__",
    "__firstlineno__", "__static_attributes__", "__annotate__", "__annotate_func__", "__parameters__", "__orig_bases__",
    "__abstractmethods__", "_abc_impl", "__slots__"])  # fmt: skip


def library_of(module_name: str | None) -> str | None:
    """Name of the library that a module belongs to, or None."""
    root = (module_name or "").partition(".")[0]
    return root if root in LIBRARIES else None


@functools.cache
def _file_codes(module_name: str) -> dict[str, list[types.CodeType]] | None:
    """{qualified name: code objects} of a module's file; None where there is no file to read."""
    spec = importlib.util.find_spec(module_name)
    get_code = getattr(None if spec is None else spec.loader, "get_code", None)
    code = None if get_code is None else get_code(module_name)
    if code is None:
        return None
    found: dict[str, list[types.CodeType]] = {}

    def collect(parent: types.CodeType, prefix: str) -> None:
        for child in parent.co_consts:
            if isinstance(child, types.CodeType):
                found.setdefault(prefix + child.co_name, []).append(child)
                is_function = bool(child.co_flags & 0x1)  # CO_OPTIMIZED: a class body is not
                collect(child, f"{prefix}{child.co_name}.{'<locals>.' if is_function else ''}")

    collect(code, "")
    return found


@functools.cache
def _all_codes(module_name: str) -> frozenset[types.CodeType]:
    return frozenset(code for codes in (_file_codes(module_name) or {}).values() for code in codes)


def _function(value: object) -> object:
    """The function in a static method, class method or property; other values as they are."""
    if isinstance(value, (staticmethod, classmethod)):
        return value.__func__
    return value.fget if isinstance(value, property) else value


def _chain(function: object) -> Iterator[types.FunctionType]:
    """A function and what its decorators wrapped."""
    while isinstance(function, types.FunctionType):
        yield function
        function = vars(function).get("__wrapped__")


def is_own(function: object, module_name: str, name: str) -> bool:
    """Whether `function`, found as `name` of a module or class, is the library's, with decorators of a library at most.

    Args:
        module_name: where it was found.
        name: qualified name there.
    """
    links = list(_chain(_function(function)))
    if not links:
        return False
    for link in links:
        home = link.__globals__.get("__name__", "")
        if home.partition(".")[0] not in DECORATORS:
            return False
        if link.__code__ not in _all_codes(home) and not link.__code__.co_filename.startswith("<"):
            return False
    defined = (_file_codes(module_name) or {}).get(name)
    return defined is None or any(link.__code__ in defined for link in links)


@functools.cache
def methods_of(kind: type) -> frozenset[str]:
    """Names of functions in a class: an instance that has one of them as an attribute overrides it."""
    return frozenset(
        name
        for base in kind.__mro__
        for name, value in vars(base).items()
        if isinstance(_function(value), types.FunctionType)
    )


def library_base(kind: type) -> tuple[type | None, str | None]:
    """The first class of a library among `kind` and its bases, and a name of it that a subclass before it overrides."""
    for place, base in enumerate(kind.__mro__):
        if library_of(base.__module__) is not None:
            known = set(dir(base)) - _NOT_BEHAVIOUR
            changed = [name for own in kind.__mro__[:place] for name in vars(own) if name in known]
            return base, (changed[0] if changed else None)
    return None, None


class Watch:
    """Names of a namespace and the values that were found right; says whether they are the same still."""

    def __init__(self, namespace: Mapping[str, object], names: list[str]) -> None:
        self.namespace, self.names, self.size = namespace, names, len(namespace)
        self.values = [namespace.get(name) for name in names]
        self.functions = [link for value in self.values for link in _chain(_function(value))]
        self.codes = [function.__code__ for function in self.functions]

    def same(self) -> bool:
        return (
            len(self.namespace) == self.size
            and all(map(is_, map(self.namespace.get, self.names), self.values))
            and all(function.__code__ is code for function, code in zip(self.functions, self.codes, strict=True))
        )


def _class_faults(kind: type) -> Iterator[str]:
    """Names of a library's class whose function is not the library's."""
    defined = _file_codes(kind.__module__)
    if defined is None:
        yield "__module__"
        return
    prefix = f"{kind.__qualname__}."
    for name, value in vars(kind).items():
        in_file = f"{prefix}{name}" in defined
        if name in CONSTRUCTION or name in HONOURED.get(kind.__name__, ()):
            continue
        if isinstance(_function(value), types.FunctionType) or in_file:
            if in_file and isinstance(value, type):
                continue
            if not is_own(value, kind.__module__, prefix + name):
                yield name


# Run by Hugging Face's loop beside the model's own classes: its caches, masks, attention and rotary embeddings.
RUNNING = (DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, torch.Tensor)
RUNNING_MODULES = (
    "transformers.masking_utils", "transformers.integrations.sdpa_attention", "transformers.integrations.moe",
    "transformers.modeling_rope_utils", "transformers.activations", "transformers.modeling_layers",
    "torch.nn.modules.linear", "torch.nn.modules.sparse", "torch.nn.modules.activation",
    "torch.nn.modules.normalization",
)  # fmt: skip
# They make an object or restore one; torch.compile replaces some of them for good.
CONSTRUCTION = frozenset(
    ["__init__", "__new__", "__init_subclass__", "__setstate__", "__getstate__", "__deepcopy__", "__reduce_ex__"]
)
# Called through Hugging Face, so that a replacement runs as it does there.
HONOURED = {"GenerationMixin": ("generate",)}


def _module_faults(module: types.ModuleType) -> Iterator[str]:
    """Names of a modeling module whose function is not the library's: those it defines and those it imports."""
    defined = _file_codes(module.__name__) or {}
    for name, value in vars(module).items():
        in_file = name in defined
        if isinstance(value, type) or (not in_file and not isinstance(value, types.FunctionType)):
            continue
        links = list(_chain(value))
        if not in_file and links[-1].__globals__.get("__name__", "").partition(".")[0] in sys.stdlib_module_names:
            continue
        if not is_own(value, module.__name__, name) or (not in_file and links[-1].__name__ != name):
            yield name


def _reached(module: types.ModuleType, namespace: types.ModuleType) -> list[str]:
    """Functions of `namespace`, torch or its functional module, that a modeling module's code may call."""
    names = {name for code in _all_codes(module.__name__) for name in code.co_names}
    return sorted(
        name for name in names if callable(vars(namespace).get(name)) and not isinstance(vars(namespace)[name], type)
    )


def _torch_faults(namespace: types.ModuleType, names: list[str]) -> Iterator[str]:
    for name in names:
        value = vars(namespace)[name]
        builtin = isinstance(value, types.BuiltinFunctionType) and value.__name__.replace("_", "") == name.replace(
            "_", ""
        )
        links = list(_chain(value))
        homes = [link.__globals__.get("__name__", "") for link in links]
        own = links and all(
            library_of(home) and link.__code__ in _all_codes(home) for link, home in zip(links, homes, strict=True)
        )
        if not builtin and not own:
            yield name


@dataclass(frozen=True)
class Homes:
    """Library classes that modules are instances of, and the modeling modules that define them."""

    bases: tuple[type, ...] = ()
    modules: tuple[str, ...] = ()

    @classmethod
    def of(cls, kinds: set[type]) -> Homes:
        bases = {base for kind in kinds for base in kind.__mro__ if library_of(base.__module__)} | set(RUNNING)
        modules = {base.__module__ for base in bases if base.__module__.startswith("transformers.models.")}
        return cls(tuple(bases), (*modules, *RUNNING_MODULES))


class Originals:
    """The classes and modules that models were built of, each checked once and watched from then on."""

    def __init__(self) -> None:
        self._kinds: dict[type, Watch] = {}
        self._modules: dict[str, list[Watch]] = {}

    def fault(self, homes: Homes) -> str | None:
        """The first "Class.name" or "module.name" that is not the library's."""
        for base in homes.bases:
            fault = self._kind_fault(base)
            if fault is not None:
                return f"{base.__qualname__}.{fault}"
        for name in homes.modules:
            fault = self._module_fault(name)
            if fault is not None:
                return fault
        return None

    def _kind_fault(self, kind: type) -> str | None:
        watch = self._kinds.get(kind)
        if watch is not None and watch.same():
            return None
        fault = next(_class_faults(kind), None)
        if fault is None:
            functions = [name for name, value in vars(kind).items() if isinstance(_function(value), types.FunctionType)]
            skipped = {*CONSTRUCTION, *HONOURED.get(kind.__name__, ())}
            watch = self._kinds[kind] = Watch(vars(kind), [name for name in functions if name not in skipped])
        return fault

    def _module_fault(self, name: str) -> str | None:
        watches = self._modules.get(name)
        if watches is not None and all(watch.same() for watch in watches):
            return None
        module = sys.modules[name]
        fault = next(_module_faults(module), None)
        if fault is not None:
            return f"{name.rpartition('.')[2]}.{fault}"
        own = [key for key, value in vars(module).items() if isinstance(value, types.FunctionType)]
        watches = [Watch(vars(module), own)]
        for namespace in (nn.functional, sys.modules["torch"]):
            names = _reached(module, namespace)
            fault = next(_torch_faults(namespace, names), None)
            if fault is not None:
                return f"{namespace.__name__}.{fault}"
            watches.append(Watch(vars(namespace), names))
        self._modules[name] = watches
        return None


ORIGINALS = Originals()
