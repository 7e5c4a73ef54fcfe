"""Whether Hugging Face would run a model's parts as FIRP does: one list of what was verified, all else is refused.

FIRP embeds tokens, runs the layers, the final norm and the head itself, with its own attention. So the model's and the
decoder's forward, the attention function, the masks and everything attached to a module have to be the library's own.
The check runs at every call. What it finds is kept and compared, so that an engine notices a model that changed.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from firp.decoder.model_rules import check_config, check_functions, read_fields
from firp.decoder.originals import ORIGINALS, Homes, is_own, library_base, library_of, methods_of
from firp.decoder.seen import Record, Seen
from firp.decoder.sharding import check_distribution, is_sharded, ranks_of, runs_shard

# torch's own modules whose result for a row does not depend on the other rows.
ROWWISE = frozenset(
    ["Linear", "Embedding", "Identity", "ModuleList", "ModuleDict", "ParameterList", "ParameterDict", "Sequential",
     "Dropout",
     "LayerNorm", "RMSNorm", "SiLU", "GELU", "ReLU", "Tanh", "Sigmoid"]
)  # fmt: skip
# Functions of the model object that Hugging Face itself lays over it, which change no output.
HARMLESS_OVERRIDES = frozenset(["to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa", "loss_function", "extra_repr"])

# Whose `generate` Hugging Face lays over a model that was loaded from a folder of `firp export`.
FOLDER_GENERATE = "firp.integrations.custom_generate"


@dataclass(frozen=True)
class Kind:
    """What is known about a class of modules.

    Attributes:
        methods: names of its functions.
        rowwise: a row's result is known not to depend on other rows.
        watched: its attributes belong to transformers' own forward, so a changed one changes what a layer computes.
        drops: a dropout module.
    """

    methods: frozenset[str]
    rowwise: bool
    watched: bool
    drops: bool


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module once, with its name, parents before children."""
    seen, waiting = set(), [("", model)]
    while waiting:
        name, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield name, module
        prefix = f"{name}." if name else ""
        waiting.extend((prefix + key, child) for key, child in reversed(module._modules.items()) if child is not None)


@functools.cache
def kind_of(kind: type, modeling: str) -> Kind:
    """What is known about a class, in models whose classes come from the module `modeling`."""
    base, overridden = library_base(kind)
    home = "" if base is None else base.__module__
    own = kind is base or (base is not None and overridden is None)
    torchs = base is not None and home.startswith("torch.nn.modules.") and base.__name__ in ROWWISE
    families = home == modeling or home == "transformers.activations"
    rowwise = own and (torchs or families or home.startswith("peft.tuners."))
    drops = "dropout" in kind.__name__.lower()
    return Kind(methods_of(kind) - HARMLESS_OVERRIDES, rowwise, home.startswith("transformers."), drops)


_verdicts: weakref.WeakKeyDictionary[PreTrainedModel, Seen] = weakref.WeakKeyDictionary()


def check_model(model: PreTrainedModel) -> Seen:
    """Check a model that is of a supported type.

    Where nothing changed since the model was checked last, that verdict stands.

    Returns:
        What was found, for a later comparison.

    Raises:
        ValueError: something that Hugging Face would run and FIRP would not; names it and what is expected.
    """
    _check_modes(model.model.embed_tokens.weight.device)
    before = _verdicts.get(model)
    own = vars(model).get("generate")  # which records leave out
    holds = before is not None and before.still_holds() and (own is None or _of_folder(own))
    seen = before if before is not None and holds else _check_modules(model)
    fault = ORIGINALS.fault(seen.homes)
    if fault is not None:
        raise ValueError(
            f"model: {fault} is not the one that its library defines, expected the original: FIRP cannot follow a "
            f"patched function"
        )
    check_functions(model.config)
    fields = read_fields(model)
    if not holds or fields != seen.fields:
        check_config(model)
        seen = replace(seen, fields=fields)
    _verdicts[model] = seen
    return seen


def _check_modules(model: PreTrainedModel) -> Seen:
    """The rules for every module on its own, and what was found."""
    library = _check_classes(model)
    modeling, device = library.__module__, model.model.embed_tokens.weight.device
    check_distribution(model)
    seen, kinds, meshes = Seen(), set(), set()
    rotary = {id(child) for child in model.model.rotary_emb.modules()}  # Read at use; Hugging Face writes to it.
    for name, module in walk(model):
        kind = kind_of(type(module), modeling)  # type: ignore[arg-type]
        attributes = module.__dict__
        if attributes["_forward_hooks"] or attributes["_forward_pre_hooks"]:
            _check_hooks(name, module)
        if not kind.methods.isdisjoint(attributes):
            _check_overrides(name, module, kind)
        if attributes["training"]:
            _check_training(name, module, kind)
        plain = True
        for holder in (attributes["_parameters"], attributes["_buffers"]):
            for key, tensor in holder.items():
                if tensor is not None:
                    if tensor.device != device:
                        _refuse_device(f"{name}.{key}", tensor, device)
                    if is_sharded(tensor):
                        meshes.add(tensor.device_mesh)
                    else:
                        plain = plain and type(tensor) in (nn.Parameter, Tensor, nn.Buffer)
        if not (kind.rowwise and plain) and module is not model:
            seen.unknown.append(name)
        seen.names.append(name)
        seen.records.append(Record.of(module, kind.watched and module is not model and id(module) not in rotary))
        kinds.add(type(module))
    seen.homes = Homes.of(kinds)
    seen.ranks = ranks_of(meshes)
    if seen.ranks.size > 1:
        _check_shards(model, seen)
    return seen


def _check_shards(model: PreTrainedModel, seen: Seen) -> None:
    """Refuse modules over shards that nobody can try: a trial would need whole rows."""
    adapted = [name for name, module in walk(model) if library_of(type(module).__module__) == "peft"]
    for name in (*seen.unknown, *adapted):
        raise ValueError(
            f"model: {name!r} ({type(model.get_submodule(name)).__name__}) is an adapter or no known module, and the "
            f"model is sharded over {seen.ranks.size} ranks, expected modules of torch and transformers, not quantised"
        )


def _check_modes(device: torch.device) -> None:
    default = torch.get_default_device()
    if default.type not in ("cpu", device.type):
        raise ValueError(
            f"model: is on {device} while torch's default device is {default}, expected cpu or the model's"
        )
    for kind in ("_global_forward_hooks", "_global_forward_pre_hooks"):
        if getattr(torch_modules, kind):
            raise ValueError(
                "model: a hook on every module is registered (torch.nn.modules.module.register_module_forward_hook or "
                "_pre_hook), "
                "expected none: it would see draft rows"
            )
    stack = [
        torch.overrides._get_current_function_mode_stack(),
        torch.utils._python_dispatch._get_current_dispatch_mode_stack(),
    ]
    for mode in (mode for modes in stack for mode in modes):
        if library_of(type(mode).__module__) != "torch":
            raise ValueError(
                f"model: {type(mode).__name__} is active, a torch mode that FIRP does not know and whose changes "
                f"would not reach its ops; expected none"
            )


def _check_classes(model: PreTrainedModel) -> type:
    """The library's class of the model, of which it and its decoder override nothing."""
    expected = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), None)
    base, overridden = library_base(type(model))
    if base is not expected:
        named = "its own class" if expected is None else expected.__name__
        raise ValueError(
            f"model: got {type(model).__name__}, expected {named} of transformers for a config of model_type "
            f"{model.config.model_type!r}"
        )
    if overridden is not None:
        raise ValueError(
            f"model: {type(model).__name__} overrides {overridden} of {base.__name__}, which FIRP cannot follow; "
            f"expected {base.__name__} itself"
        )
    decoder = model.model
    parts = [("model", decoder, "Model"), ("model.rotary_emb", decoder.rotary_emb, "RotaryEmbedding")]
    for i, layer in enumerate(decoder.layers):
        parts += [(f"model.layers.{i}", layer, "Layer"), (f"model.layers.{i}.self_attn", layer.self_attn, "Attention")]
    for name, module, ending in parts:
        found, overridden = _library_part(type(module), base.__module__, ending)  # type: ignore[arg-type]
        if not found:
            raise ValueError(
                f"model: {name!r} is {type(module).__name__}, expected the {ending.lower()} class of "
                f"{base.__module__}: FIRP takes its place"
            )
        if overridden is not None:
            raise ValueError(
                f"model: {name!r} is {type(module).__name__}, which overrides {overridden}; expected the library's "
                f"own class"
            )
    return base


@functools.cache
def _library_part(kind: type, modeling: str, ending: str) -> tuple[bool, str | None]:
    base, overridden = library_base(kind)
    return base is not None and base.__module__ == modeling and base.__name__.endswith(ending), overridden


def _check_hooks(name: str, module: nn.Module) -> None:
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    for hook in hooks:
        home = getattr(hook, "__globals__", {}).get("__name__", "")
        known = home in ("transformers.utils.output_capturing", "transformers.modeling_utils")
        if not (known and is_own(hook, home, hook.__qualname__)):
            raise ValueError(
                f"model: {name or 'the model'!r} has a forward hook, expected none: it would see draft rows, or not "
                f"run at all "
                "(peft's adapter_names is such a hook, and so are activation steering and offloading)"
            )


def _of_folder(value: object) -> bool:
    """Whether this is the `generate` of an exported folder, as Hugging Face binds it to the model and nothing else."""
    home = sys.modules.get(FOLDER_GENERATE)
    return (
        home is not None
        and isinstance(value, functools.partial)
        and value.func is home.generate
        and not value.args
        and value.keywords.keys() == {"model"}
    )


def _check_overrides(name: str, module: nn.Module, kind: Kind) -> None:
    """Refuse what lies over a module's functions, but for the forward of a shard and the generate of a folder."""
    for attribute, value in module.__dict__.items():
        of_shard = attribute == "forward" and runs_shard(module)
        of_folder = attribute == "generate" and _of_folder(value)
        if attribute in kind.methods and not of_shard and not of_folder:
            raise ValueError(
                f"model: {repr(name) if name else 'the model'} has its own {attribute} (accelerate's device_map or "
                "offloading, a kernel, or a patch), which FIRP cannot follow; load the model on one device, unpatched"
            )


def _refuse_device(name: str, tensor: Tensor, device: torch.device) -> None:
    raise ValueError(
        f"model: {name!r} is on {tensor.device}, expected {device} as the embeddings: load the whole model on one "
        f"device"
    )


def _check_training(name: str, module: nn.Module, kind: Kind) -> None:
    """Refuse dropout, or noise on a router, that is active."""
    for key, value in module.__dict__.items():
        if (kind.drops and key == "p") or "drop" in key or "jitter" in key:
            values = value.values() if isinstance(value, dict) else [value]
            active = [v for v in values if isinstance(v, (int, float)) and v > 0]
            if active:
                raise ValueError(
                    f"model: {name or 'the model'!r} is in training mode with {key} {active[0]}, expected model.eval()"
                )
    if not kind.rowwise and not kind.watched:
        raise ValueError(f"model: {name!r} ({type(module).__name__}) is in training mode, expected model.eval()")
