"""What of a model's configuration and layers has to hold where FIRP takes the place of Hugging Face's forward.

Hugging Face reads some fields of the configuration at every forward: how many layers run, which mask each sees, which
function attends. The code of the model's own classes says which, so a field that a family does not read is not asked.
"""

from __future__ import annotations

import functools
import sys
import types

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from firp.decoder.originals import is_own
from firp.decoder.rotary import LENGTH_ROPE_TYPES, rope_type_of

# Functions that compute softmax attention over what the mask shows, as FIRP's does.
ATTENTION_FUNCTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")
LAYER_TYPES = ("full_attention", "sliding_attention")


@functools.cache
def _names_read(kind: type[nn.Module]) -> frozenset[str]:
    """Names that a class's forward mentions, past its decorators."""
    function = kind.forward
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return frozenset(function.__code__.co_names)


@functools.cache
def _names_of_forwards(modeling: str) -> frozenset[str]:
    """Names that functions of a modeling module mention, those that build or initialise a module left out."""
    names: set[str] = set()
    for value in vars(sys.modules[modeling]).values():
        if isinstance(value, type) and value.__module__ == modeling:
            for name, function in vars(value).items():
                if name not in ("__init__", "_init_weights") and isinstance(function, types.FunctionType):
                    while hasattr(function, "__wrapped__"):
                        function = function.__wrapped__
                    names.update(function.__code__.co_names)
    return frozenset(names)


def library_kind(module: nn.Module) -> type:
    """The class of transformers that a module is an instance of."""
    return next(base for base in type(module).__mro__ if base.__module__.startswith("transformers."))


# Read elsewhere than in the modeling module: by masks, by rotary embeddings, by this package.
_READ_ELSEWHERE = (
    "_attn_implementation_internal", "is_causal", "rope_parameters", "max_position_embeddings", "num_key_value_heads",
    "head_dim", "hidden_size", "return_dict", "_experts_implementation_internal", "num_hidden_layers",
    "sliding_window", "layer_types", "attention_chunk_size",
)  # fmt: skip
_NOT_READ = frozenset(["vocab_size", "use_cache", "pad_token_id", "output_router_logits", "initializer_range"])


def read_fields(model: PreTrainedModel) -> dict[str, object]:
    """Fields of the configuration, and numbers of the model object itself, that a forward reads, and their values."""
    kind, fields, own = library_kind(model), vars(model.config), vars(model)
    found = {f"config.{name}": _frozen(fields[name]) for name in _fields_read(kind.__module__, frozenset(fields))}
    numbers = {name for name in _names_read(kind) if isinstance(own.get(name), (int, float))} - _NOT_READ
    return found | {f"model.{name}": own[name] for name in sorted(numbers)}


@functools.cache
def _fields_read(modeling: str, fields: frozenset[str]) -> tuple[str, ...]:
    read = (_names_of_forwards(modeling) | set(_READ_ELSEWHERE)) - _NOT_READ
    return tuple(sorted(fields & read))


def _frozen(value: object) -> object:
    """A value that a later change of the configuration does not change."""
    if isinstance(value, dict):
        return tuple((key, _frozen(entry)) for key, entry in value.items())
    return tuple(value) if isinstance(value, list) else value


def head_counts(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Query heads, key heads and the width of each."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_attention_heads, config.num_key_value_heads, head_dim


def running_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers that Hugging Face runs: the first `config.num_hidden_layers` where the family's forward reads that."""
    layers, config = list(model.model.layers), model.config
    if "num_hidden_layers" not in _names_read(library_kind(model.model)):
        return layers
    return layers[: config.num_hidden_layers]


def windows(model: PreTrainedModel) -> list[int | None]:
    """The sliding window of each running layer, as the masks of Hugging Face's forward have it."""
    config, names = model.config, _names_read(library_kind(model.model))
    count = len(running_layers(model))
    window = getattr(config, "sliding_window", None)
    if "layer_types" in names:
        return [window if kind == "sliding_attention" else None for kind in config.layer_types[:count]]
    return [window if "sliding_window" in names else None] * count


def _cache_windows(config: PreTrainedConfig, count: int) -> list[int | None]:
    """The positions that Hugging Face's cache keeps of each layer; None keeps all."""
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [window] * count
    return [window if kind != "full_attention" else None for kind in kinds[:count]]


def check_config(model: PreTrainedModel) -> None:
    """Raise ValueError, naming the field, unless what Hugging Face's forward would read is what FIRP supports."""
    config, decoder = model.config, model.model
    if decoder.config is not config:
        raise ValueError("model: its decoder has another config object than the model, expected one for both")
    if getattr(config, "is_causal", True) is not True:
        raise ValueError(f"model: got config.is_causal {config.is_causal}, expected True: FIRP decodes causally")
    if getattr(config, "return_dict", True) is not True:
        raise ValueError(f"model: got config.return_dict {config.return_dict}, expected True")
    width = getattr(decoder.embed_tokens, "embedding_dim", config.hidden_size)
    if width != config.hidden_size:
        raise ValueError(
            f"model: got config.hidden_size {config.hidden_size}, its embeddings are {width} wide: expected one width"
        )
    layers, count = running_layers(model), config.num_hidden_layers
    follows = "num_hidden_layers" in _names_read(library_kind(decoder))
    if not layers or count < 1 or (count != len(layers) and not follows):
        raise ValueError(
            f"model: got config.num_hidden_layers {count}, expected {len(decoder.layers)}, as the model has layers"
        )
    if "layer_types" in _names_read(library_kind(decoder)):
        if len(config.layer_types) < len(layers):
            raise ValueError(
                f"model: got {len(config.layer_types)} config.layer_types, expected {len(layers)}, one for each layer"
            )
        strange = set(config.layer_types[: len(layers)]) - set(LAYER_TYPES)
        if strange:
            raise ValueError(f"model: got config.layer_types {sorted(strange)}, expected {', '.join(LAYER_TYPES)}")
    for place, layer in enumerate(layers):
        _check_layer(place, layer, config)
    follows_types = "layer_types" in _names_read(library_kind(decoder))
    for place, (seen, kept) in enumerate(zip(windows(model), _cache_windows(config, len(layers)), strict=False)):
        if kept != seen and (kept is not None or not follows_types):
            raise ValueError(
                f"model: Hugging Face's cache would keep a window of {kept} in layer {place}, its masks show {seen}, "
                f"expected one "
                "window (config.sliding_window, config.layer_types)"
            )
    sliding = any(window is not None for window in windows(model))
    if follows_types and getattr(decoder, "has_sliding_layers", sliding) is not sliding:
        raise ValueError(
            f"model: got model.has_sliding_layers {decoder.has_sliding_layers}, expected {sliding} (config.layer_types)"
        )
    _check_rotary(decoder.rotary_emb, config)


def _check_layer(place: int, layer: nn.Module, config: PreTrainedConfig) -> None:
    attention = layer.self_attn
    for name, holder in (("self_attn.", attention), ("", layer)):
        index = getattr(holder, "layer_idx", place)
        if index != place:
            raise ValueError(
                f"model: model.layers.{place}.{name}layer_idx is {index}, expected {place}: layers were reordered, "
                f"dropped or "
                "repeated; give each its own module and number (layer_idx), and config.num_hidden_layers their count"
            )
    heads, kv_heads, head_dim = head_counts(config)
    for name, expected in (("num_key_value_groups", heads // kv_heads), ("head_dim", head_dim)):
        if getattr(attention, name, expected) != expected:
            raise ValueError(
                f"model: layer {place} has {name} {getattr(attention, name)}, expected {expected} as its config says "
                f"(pruned "
                "heads are not supported)"
            )
    if attention.config is not config:
        raise ValueError(
            f"model: model.layers.{place}.self_attn has another config object than the model, expected the model's"
        )
    if getattr(attention, "is_causal", True) is not True:
        raise ValueError(
            f"model: model.layers.{place}.self_attn.is_causal is {attention.is_causal}, expected True: FIRP decodes "
            f"causally"
        )


def check_functions(config: PreTrainedConfig) -> None:
    """The functions that attend, mask and run experts are the library's known ones."""
    name = config._attn_implementation
    if name not in ATTENTION_FUNCTIONS:
        raise ValueError(
            f"model: got attention function {name!r}, expected one of {', '.join(ATTENTION_FUNCTIONS)}: FIRP's own "
            f"attention takes its place"
        )
    for interface in (AttentionInterface(), AttentionMaskInterface()):
        function = interface.get(name)
        if function is not None and not is_own(
            function, getattr(function, "__module__", ""), getattr(function, "__qualname__", "")
        ):
            raise ValueError(
                f"model: attention function {name!r} was registered again, expected the library's: FIRP's own "
                f"attention takes its place"
            )
    experts = getattr(config, "_experts_implementation", None)
    function = None if experts in (None, "eager") else ALL_EXPERTS_FUNCTIONS.get(experts)
    if function is not None and not is_own(
        function, getattr(function, "__module__", ""), getattr(function, "__qualname__", "")
    ):
        raise ValueError(f"model: experts function {experts!r} was registered by a caller, expected one of the library")


def _check_rotary(rotary: nn.Module, config: PreTrainedConfig) -> None:
    kind = rope_type_of(config)
    if getattr(rotary, "rope_type", kind) != kind:
        raise ValueError(
            f"model: got rope_type {kind!r} in its config, but its rotary embedding was made for {rotary.rope_type!r}"
        )
    if kind in LENGTH_ROPE_TYPES:
        maker = ROPE_INIT_FUNCTIONS[kind]
        if not is_own(maker, "transformers.modeling_rope_utils", maker.__qualname__):
            raise ValueError(f"model: ROPE_INIT_FUNCTIONS[{kind!r}] is not the library's, expected the original")
        if getattr(rotary, "config", config) is not config:
            raise ValueError("model: model.rotary_emb has another config object than the model, expected the model's")
        if rotary.original_max_seq_len != config.max_position_embeddings:
            raise ValueError(
                f"model: got config.max_position_embeddings {config.max_position_embeddings}, but model.rotary_emb "
                f"was made for "
                f"{rotary.original_max_seq_len}"
            )
