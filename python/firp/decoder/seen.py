"""What a model object held when it was checked, kept so that a later check can tell what changed."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from torch import nn

from firp.decoder.originals import Homes
from firp.tools.ranks import ALONE, Ranks

# Attributes that change while Hugging Face trains or generates, and that no forward without dropout follows.
PASSING = frozenset(["training", "gradient_checkpointing", "_gradient_checkpointing_func", "_is_hf_initialized"])
# Attributes of a model that lead back to it: the `generate` of a folder, which Hugging Face binds to the model, and the
# engine that it keeps. A record of them would keep the model alive.
ENGINE = "_firp_engine"
LEADING_BACK = ("generate", ENGINE)
# Attributes that every module starts with: dictionaries of parameters, hooks and children, compared one by one.
_CONTAINERS = len(nn.Module().__dict__)


class Record(NamedTuple):
    """What one module held: nothing here keeps a module or its weights alive.

    Attributes:
        module: a weak reference.
        watched: whether a changed attribute changes what a layer computes.
        keys, values: its attributes; before their values, whether it trains.
        kind: its class.
        children: identities of its submodules.
        hooks: identities of its forward hooks.
        tensors: identity, class, dtype and device of each parameter and buffer.
    """

    module: weakref.ref
    watched: bool
    keys: tuple[str, ...]
    kind: type
    values: tuple
    children: tuple[int, ...]
    hooks: tuple[int, ...]
    tensors: tuple

    @classmethod
    def of(cls, module: nn.Module, watched: bool) -> Record:
        return cls(
            weakref.ref(module),
            watched,
            tuple(_own(module.__dict__)),
            type(module),
            *_contents(module.__dict__),
        )

    def still_holds(self) -> bool:
        module = self.module()
        return type(module) is self.kind and _contents(module.__dict__) == self[4:]


def _own(attributes: dict) -> dict:
    """Attributes that are no containers and lead to nothing that holds the module."""
    own = dict(islice(attributes.items(), _CONTAINERS, None))
    return {key: own[key] for key in own if key not in LEADING_BACK} if _leads_back(attributes) else own


def _leads_back(attributes: dict) -> bool:
    return LEADING_BACK[0] in attributes or LEADING_BACK[1] in attributes


def _contents(own: dict) -> tuple[tuple, tuple, tuple, tuple]:
    hooks, before, children = own["_forward_hooks"], own["_forward_pre_hooks"], own["_modules"]
    parameters, buffers = own["_parameters"], own["_buffers"]
    tensors: tuple = ()
    if parameters or buffers:
        held = (*parameters.values(), *buffers.values())
        tensors = tuple([(id(t), type(t), t.dtype, t.device) for t in held if t is not None])
    # This runs for every module at every call: no dictionary where none is needed.
    values = _own(own).values() if _leads_back(own) else list(own.values())[_CONTAINERS:]
    return (
        (own["training"], *values),
        tuple(map(id, children.values())) if children else (),
        tuple(map(id, (*hooks.values(), *before.values()))) if hooks or before else (),
        tensors,
    )


@dataclass
class Seen:
    """What a model held when it was checked.

    Attributes:
        names, records: of every module, in the order of a walk.
        homes: the library's classes and modules that it was built of.
        fields: configuration fields that its forward reads, and their values.
        unknown: names of modules whose independence of other rows is not known from their class.
        proven: whether a trial has shown it (`firp.decoder.independence`).
        ranks: over which its weights are sharded.
    """

    names: list[str] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    homes: Homes = field(default_factory=Homes)
    fields: dict[str, object] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    proven: bool = False
    ranks: Ranks = ALONE

    def still_holds(self) -> bool:
        """Whether nothing changed at all, so that the verdict stands."""
        try:
            return all(record.still_holds() for record in self.records)
        except (RuntimeError, ValueError):  # Tensors compare element by element: another tensor than before.
            return False

    def difference(self, later: Seen) -> str | None:
        """What changed between two checks, in words, or None where nothing did that a layer computes with."""
        for name, value in self.fields.items():
            if later.fields.get(name) != value:
                return f"{name} from {value!r} to {later.fields.get(name)!r}"
        for place, (name, old) in enumerate(zip(self.names, self.records, strict=True)):
            whose = f"{name!r}" if name else "the model itself"
            new = later.records[place] if place < len(later.records) else None
            if (
                new is None
                or name != later.names[place]
                or old.module() is not new.module()
                or old.kind is not new.kind
                or old.children != new.children
            ):
                return f"modules of {whose}"
            if old.tensors != new.tensors:
                return f"a parameter of {whose}, its dtype or its device"
            if old.watched:
                before, after = (dict(zip(record.keys, record.values[1:], strict=True)) for record in (old, new))
                for key in {**before, **after}:
                    if key not in PASSING and not _equal(before.get(key), after.get(key)):
                        return f"attribute {key} of {whose}"
        return None


def _equal(a: object, b: object) -> bool:
    plain = (bool, int, float, str, type(None))
    return a is b or (isinstance(a, plain) and isinstance(b, plain) and a == b)
