"""Places where a model object can say something else than its library does: each is patched, one at a time."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import ExitStack

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, GenerationMixin, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

Place = Callable[[PreTrainedModel, pytest.MonkeyPatch, ExitStack], None]
PLACES: dict[str, Place] = {}


def place(function: Place) -> Place:
    PLACES[function.__name__] = function
    return function


def changed(out):
    """Another value of the same shape, for anything that a module or function returned."""
    if isinstance(out, torch.Tensor):
        return out * 1.7 + out.roll(1, -1) * 0.5 if out.is_floating_point() else out
    if isinstance(out, tuple):
        return (changed(out[0]), *out[1:])
    if isinstance(out, dict):  # Hugging Face's outputs are.
        key = "logits" if "logits" in out else "last_hidden_state"
        if key in out:
            out[key] = changed(out[key])
    return out


def wrapping(function):
    return functools.wraps(function)(lambda *args, **kwargs: changed(function(*args, **kwargs)))


def modeling(model):
    return sys.modules[type(model).__module__]


def part(model, name):
    layer = model.model.layers[1]
    norms = [child for key, child in layer.named_children() if "norm" in key]
    parts = {
        "model": model, "decoder": model.model, "layer": layer, "attention": layer.self_attn, "mlp": layer.mlp,
        "rotary": model.model.rotary_emb, "norm": norms[0] if norms else model.model.norm, "head": model.lm_head,
        "embedding": model.model.embed_tokens,
    }  # fmt: skip
    return parts[name]


def _class_method(name):
    def patch(model, monkeypatch, undo):
        kind = type(part(model, name))
        monkeypatch.setattr(kind, "forward", wrapping(kind.forward))

    PLACES[f"class method forward of the {name}"] = patch


def _own_forward(name):
    def patch(model, monkeypatch, undo):
        module = part(model, name)
        module.forward = wrapping(module.forward)

    PLACES[f"forward of the {name} itself"] = patch


def _hook(name, kind):
    def patch(model, monkeypatch, undo):
        hook = (lambda module, args, out: changed(out)) if kind == "forward" else (lambda module, args: changed(args))
        getattr(part(model, name), "register_forward_hook" if kind == "forward" else "register_forward_pre_hook")(hook)

    PLACES[f"{kind} hook on the {name}"] = patch


for _name in ("model", "decoder", "layer", "attention", "mlp", "norm", "rotary"):
    _class_method(_name)
for _name in ("model", "decoder", "layer", "attention", "mlp", "norm", "head", "embedding"):
    _own_forward(_name)
for _name in ("model", "decoder", "layer", "attention", "mlp", "norm", "head", "embedding"):
    _hook(_name, "forward")
for _name in ("layer", "mlp", "head"):
    _hook(_name, "pre")


@place
def hook_on_every_module(model, monkeypatch, undo):
    handle = nn.modules.module.register_module_forward_hook(
        lambda m, args, out: 1.5 * out if m is model.lm_head else None
    )
    undo.callback(handle.remove)


@place
def pre_hook_on_every_module(model, monkeypatch, undo):
    handle = nn.modules.module.register_module_forward_pre_hook(
        lambda m, args: (2 * args[0],) if m is model.lm_head else None
    )
    undo.callback(handle.remove)


@place
def class_method_prepare_inputs_for_generation(model, monkeypatch, undo):
    kind = type(model)
    old = kind.prepare_inputs_for_generation

    def doubled(self, *args, **kwargs):
        inputs = old(self, *args, **kwargs)
        return {**inputs, "position_ids": inputs["position_ids"] * 2}

    monkeypatch.setattr(kind, "prepare_inputs_for_generation", doubled)


@place
def class_method_of_the_generation_loop(model, monkeypatch, undo):
    old = GenerationMixin._sample
    monkeypatch.setattr(
        GenerationMixin, "_sample", lambda self, ids, *args, **kwargs: old(self, ids, *args, **kwargs).flip(1)
    )


@place
def code_of_a_class_method(model, monkeypatch, undo):
    function = nn.Embedding.forward
    monkeypatch.setattr(function, "__code__", (lambda self, input: self.weight[input] * 1.5).__code__)


@place
def subclass_of_the_model(model, monkeypatch, undo):
    kind = type(model)
    model.__class__ = type("Own", (kind,), {"forward": wrapping(kind.forward)})


@place
def subclass_of_the_attention(model, monkeypatch, undo):
    kind = type(part(model, "attention"))
    part(model, "attention").__class__ = type("Own", (kind,), {"forward": wrapping(kind.forward)})


@place
def module_function_of_rotary_embeddings(model, monkeypatch, undo):
    module = modeling(model)
    monkeypatch.setattr(module, "apply_rotary_pos_emb", wrapping_pair(module.apply_rotary_pos_emb))


def wrapping_pair(function):
    return lambda *args, **kwargs: tuple(1.3 * rows for rows in function(*args, **kwargs))


@place
def module_function_of_the_mask(model, monkeypatch, undo):
    monkeypatch.setattr(modeling(model), "create_causal_mask", lambda **kwargs: None)


@place
def torch_function_linear(model, monkeypatch, undo):
    old = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *args: 1.1 * old(*args))


@place
def attention_function_of_ones_own(model, monkeypatch, undo):
    def sharper(module, query, key, value, mask, scaling=None, **others):
        return sdpa_attention_forward(module, query, key, value, mask, scaling=2 * scaling, **others)

    monkeypatch.setitem(AttentionInterface._global_mapping, "sharper", sharper)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "sharper", sdpa_mask)
    model.config._attn_implementation = "sharper"


@place
def attention_function_registered_anew(model, monkeypatch, undo):
    old = AttentionInterface._global_mapping["sdpa"]
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", wrapping(old))


@place
def mask_function_registered_anew(model, monkeypatch, undo):
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "sdpa", lambda *args, **kwargs: None)


@place
def eager_attention(model, monkeypatch, undo):
    model.set_attn_implementation("eager")
