"""Drive a Hugging Face decoder layer by layer, without changing it.

A *layer view* is a shallow copy of the user's decoder layer whose attention module points at an
attention function of ours. Parameters and submodules are shared with the model; the model
itself is never written to, so an ordinary `model.generate` may run beside it.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from firp.decoder.attention import ATTENTION_NAME, AttentionStep
from firp.decoder.independence import check_rows
from firp.decoder.model_check import check_model
from firp.decoder.model_rules import head_counts, running_layers, windows
from firp.decoder.rotary import FIXED_ROPE_TYPES, LENGTH_ROPE_TYPES, LengthRotary, rope_type_of
from firp.decoder.seen import Seen
from firp.tools.ranks import local_heads

# Decoders that run embedding, layers, norm and head as Llama does; each is proven by a test.
SUPPORTED_MODEL_TYPES = (
    "apertus", "arcee", "cohere", "cohere2", "cwm", "ernie4_5", "exaone4", "gemma", "glm", "glm4", "granite", "helium",
    "hunyuan_v1_dense", "llama", "ministral", "mistral", "mixtral", "olmo", "olmo2", "olmoe", "phi3", "qwen2",
    "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "starcoder2",
)  # fmt: skip
SUPPORTED_ROPE_TYPES = FIXED_ROPE_TYPES + LENGTH_ROPE_TYPES


def shallow(module: nn.Module) -> Any:
    """A shallow copy, without what makes `copy.copy` slow: an engine needs two for each layer."""
    view = object.__new__(type(module))
    view.__dict__.update(module.__dict__)
    return view


def replace_submodule(view: nn.Module, name: str, submodule: nn.Module) -> None:
    """Put `submodule` into the shallow copy `view` without touching the module it was copied from."""
    view._modules = {**view._modules, name: submodule}


def view_config(config: object) -> object:
    """A copy of a configuration by which attention modules call the `AttentionStep`."""
    copied: Any = copy.copy(config)
    copied._attn_implementation_internal = ATTENTION_NAME
    return copied


def make_layer_view(
    layer: nn.Module, place: int, window: int | None, heads: tuple[int, int, int], config: object
) -> nn.Module:
    """Return a view of one decoder layer whose attention calls the `AttentionStep` passed as `firp_step`.

    Args:
        place: 0-based, among the layers that run; keys and values are found by it.
        window: sliding window of the layer, as the model's masks have it.
        heads: query heads and key heads that this process holds, and the width of each.
        config: from `view_config` of the layer's own.
    """
    attention = shallow(layer.self_attn)
    # Past `nn.Module.__setattr__`, which takes as long as all else here.
    attention.__dict__.update(config=config, layer_idx=place, firp_window=window, firp_heads=heads)
    view = shallow(layer)
    replace_submodule(view, "self_attn", attention)
    return view


def check_supported(model: PreTrainedModel) -> Seen:
    """What `model` holds, if it is a decoder that layer views can drive.

    Raises:
        ValueError: it is not; names what is wrong.
    """
    if hasattr(model, "get_base_model"):
        raise ValueError(
            f"model: got {type(model).__name__}, expected the decoder inside it: pass model.get_base_model(), whose "
            "layers hold the adapters"
        )
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            f"model: got {type(model).__name__} of torch.compile, expected the model inside it: pass model._orig_mod; "
            "Engine(compile=True) compiles its layers"
        )
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise ValueError(
            f"model: got {type(model).__name__} with model_type {model_type!r}, "
            f"expected a causal decoder of type {', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    if not hasattr(getattr(model, "model", None), "layers") or model.get_output_embeddings() is None:
        raise ValueError(f"model: got {type(model).__name__}, expected a causal language model with a head")
    rope_type = rope_type_of(model.config)
    if rope_type not in SUPPORTED_ROPE_TYPES:
        raise ValueError(f"model: got rope_type {rope_type!r}, expected one of {', '.join(SUPPORTED_ROPE_TYPES)}")
    quantisation: Any = getattr(model.config, "quantization_config", None)
    if getattr(quantisation, "load_in_8bit", False) and quantisation.llm_int8_threshold > 0:
        raise ValueError(
            f"model: got llm_int8_threshold {quantisation.llm_int8_threshold}, expected 0.0: its 8-bit linears look "
            "for outliers over all rows of a forward, so that drafts would change the output; load with "
            "BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)"
        )
    return check_model(model)


class Adapters(NamedTuple):
    """What puts the package's ops in the place of a model's modules.

    Attributes:
        layer: a layer view to the view to use.
        norm, head: the model to a replacement of its final norm and of its head.
        keeps: whether layers that were made so may serve the next engine: they hold no tensor and no module of the
            model by themselves.
    """

    layer: Callable[[nn.Module], nn.Module]
    norm: Callable[[PreTrainedModel], Callable[[Tensor], Tensor]]
    head: Callable[[PreTrainedModel], Callable[[Tensor], Tensor]]
    keeps: Callable[[list[nn.Module]], bool] = lambda layers: False


class _Views(NamedTuple):
    seen: Seen
    adapters: Adapters
    layers: list[nn.Module]
    watched: list[weakref.ref]


# Adapted layer views of models: the next engine finds them while nothing that `Seen` tells of has changed. They go with
# the model, and with any module of its layers.
_views: weakref.WeakKeyDictionary[PreTrainedModel, _Views] = weakref.WeakKeyDictionary()


def _keep_views(model: PreTrainedModel, seen: Seen, adapters: Adapters, layers: list[nn.Module]) -> None:
    owner = weakref.ref(model)

    def forget(_: weakref.ref) -> None:
        if (alive := owner()) is not None:
            _views.pop(alive, None)

    watched = [weakref.ref(module, forget) for layer in running_layers(model) for module in layer.modules()]
    _views[model] = _Views(seen, adapters, list(layers), watched)


class DecoderView:
    """The parts of a causal decoder that a FIRP step needs, each callable on its own.

    Args:
        model: a Hugging Face causal language model of a supported type.
        adapters: None leaves the model's modules in their places.

    Raises:
        ValueError: `model` is not a decoder of a supported kind.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        adapters: Adapters | None = None,
    ) -> None:
        self._seen = check_supported(model)
        self.config = model.config
        self.decoder = model.model
        self.ranks = self._seen.ranks
        plan = getattr(model, "tp_plan", None) if self.ranks.size > 1 else None
        # Query heads and key heads of this rank, and the width of each.
        self.heads = (*local_heads(model.config, plan, self.ranks.size), head_counts(model.config)[2])
        self.layers = self._layer_views(model, adapters)
        self.norm = adapters.norm(model) if adapters else self.decoder.norm
        self.head = adapters.head(model) if adapters else model.get_output_embeddings()
        # Granite and Cohere scale embeddings and scores outside their layers.
        self.embedding_factor = getattr(self.decoder, "embedding_multiplier", 1)
        self.score_factor = getattr(model, "logit_scale", 1)
        self.score_divisor = getattr(self.config, "logits_scaling", 1)
        self.windows = windows(model)
        by_length = rope_type_of(self.config) in LENGTH_ROPE_TYPES
        self._rotary = LengthRotary(self.decoder.rotary_emb, self.config) if by_length else None
        self.model = model
        # The model's weights and buffers, found once for as long as they are those that were seen.
        self._tensors: tuple[Seen, list[Tensor]] | None = None
        self._check_rows()

    def _layer_views(self, model: PreTrainedModel, adapters: Adapters | None) -> list[nn.Module]:
        found = _views.get(model)
        if found is not None and found.seen is not self._seen:
            _views.pop(model, None)
        elif found is not None and found.adapters is adapters:
            return list(found.layers)
        own = {id(layer.self_attn.config): layer.self_attn.config for layer in running_layers(model)}
        configs = {name: view_config(config) for name, config in own.items()}  # one for all layers, as they have it
        layers = [
            make_layer_view(layer, place, window, self.heads, configs[id(layer.self_attn.config)])
            for place, (layer, window) in enumerate(zip(running_layers(model), windows(model), strict=True))
        ]
        if adapters is not None:
            layers = [adapters.layer(view) for view in layers]
            if adapters.keeps(layers):
                _keep_views(model, self._seen, adapters, layers)
        return layers

    def _check_rows(self) -> None:
        if self._seen.unknown and not self._seen.proven:
            check_rows(self, self._seen.unknown)
            self._seen.proven = True

    def check_unchanged(self) -> None:
        """Check the model as it is now.

        Raises:
            ValueError: it is no longer supported, or holds other values than those the views were made of.
        """
        found = check_supported(self.model)
        if found is not self._seen:
            changed = self._seen.difference(found)
            if changed is not None:
                raise ValueError(
                    f"engine: the model changed after the engine was made ({changed}), expected a new Engine"
                )
            self._seen = found
            self._check_rows()
        if self._rotary is not None:
            self._rotary.check()

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def device(self) -> torch.device:
        return self.decoder.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.embed_tokens.weight.dtype

    @property
    def only_known_modules(self) -> bool:
        """Whether every module is known from its class in transformers or torch, and none is quantised."""
        return not self._seen.unknown and getattr(self.config, "quantization_config", None) is None

    def addresses(self) -> tuple[int, ...]:
        """Where the model's weights and buffers are: a captured step reads them there."""
        if self._tensors is None or self._tensors[0] is not self._seen:
            self._tensors = self._seen, [*self.model.parameters(), *self.model.buffers()]
        return tuple(map(Tensor.data_ptr, self._tensors[1]))

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids [B, R] to hidden rows [B, R, d]."""
        hidden = self.decoder.embed_tokens(tokens)
        return hidden if self.embedding_factor == 1 else hidden * self.embedding_factor

    def rotary(self, hidden: Tensor, position_ids: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, R, D] of the position ids [B, R]; `lengths` [B]: of the prompts that rows belong to."""
        if self._rotary is not None:
            return self._rotary(hidden, position_ids, lengths)
        return self.decoder.rotary_emb(hidden, position_ids)

    @property
    def fixed_rotary(self) -> nn.Module | None:
        """The model's own rotary embedding, where its frequencies do not follow the length of a sequence."""
        return self.decoder.rotary_emb if self._rotary is None else None

    def run_layers(
        self, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor], step: AttentionStep, start: int, stop: int
    ) -> Tensor:
        """Pass hidden rows [B, R, d] through layers start..stop-1 (0-based).

        `position_embeddings` are those of the rows, from `rotary`.
        """
        for layer in self.layers[start:stop]:
            hidden = layer(
                hidden,
                attention_mask=None,
                position_embeddings=position_embeddings,
                firp_step=step,
            )
        return hidden

    def scaled(self, scores: Tensor) -> Tensor:
        """Products of the head's weight and normed rows, as the model scales its scores."""
        if self.score_factor == self.score_divisor == 1:
            return scores
        return scores * self.score_factor / self.score_divisor

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden rows [..., d] after the last layer to scores [..., V], by the model's own norm and head."""
        return self.scaled(self.head(self.norm(hidden)))
