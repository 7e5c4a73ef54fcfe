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
    """Another value of the same shape, whatever a module or function returned."""
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
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: 1.5 * out if m is model.lm_head else None)
    undo.callback(handle.remove)


@place
def pre_hook_on_every_module(model, monkeypatch, undo):
    handle = nn.modules.module.register_module_forward_pre_hook(lambda m, args: (2 * args[0],) if m is model.lm_head else None)
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
    monkeypatch.setattr(GenerationMixin, "_sample", lambda self, ids, *args, **kwargs: old(self, ids, *args, **kwargs).flip(1))


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


@place
def config_num_hidden_layers(model, monkeypatch, undo):
    model.config.num_hidden_layers = 3


@place
def config_sliding_window(model, monkeypatch, undo):
    model.config.sliding_window = 3


@place
def config_layer_types(model, monkeypatch, undo):
    model.config.layer_types = ["full_attention", "sliding_attention"] * 2


@place
def config_is_causal(model, monkeypatch, undo):
    model.config.is_causal = False


@place
def config_scales(model, monkeypatch, undo):
    for name in ("logits_scaling", "embedding_multiplier", "residual_multiplier", "clip_qkv"):
        if getattr(model.config, name, None) is not None:
            setattr(model.config, name, 0.3 * getattr(model.config, name))


@place
def config_rope_parameters(model, monkeypatch, undo):
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 50.0, "factor": 9.0}


@place
def config_max_position_embeddings(model, monkeypatch, undo):
    model.config.max_position_embeddings = 12


@place
def another_config_object(model, monkeypatch, undo):
    model.config = type(model.config).from_dict(model.config.to_dict())
    model.config.num_hidden_layers = 2


@place
def scale_of_the_scores_of_the_model_itself(model, monkeypatch, undo):
    if hasattr(model, "logit_scale"):
        model.logit_scale = -0.7


@place
def attention_scaling(model, monkeypatch, undo):
    part(model, "attention").scaling *= 3


@place
def attention_is_causal(model, monkeypatch, undo):
    part(model, "attention").is_causal = False


@place
def attention_sliding_window(model, monkeypatch, undo):
    part(model, "attention").sliding_window = 2


@place
def attention_layer_idx(model, monkeypatch, undo):
    layers = model.model.layers
    layers[1].self_attn.layer_idx, layers[2].self_attn.layer_idx = 2, 1


@place
def layers_in_another_order(model, monkeypatch, undo):
    a, b, c, d = model.model.layers
    model.model.layers = nn.ModuleList([a, c, b, d])


@place
def layers_dropped(model, monkeypatch, undo):
    model.model.layers = nn.ModuleList([model.model.layers[i] for i in (0, 2, 3)])


@place
def layers_repeated(model, monkeypatch, undo):
    model.model.layers = nn.ModuleList([model.model.layers[i] for i in (0, 1, 1, 3)])


@place
def parts_shared_between_layers(model, monkeypatch, undo):
    model.model.layers[2].self_attn = model.model.layers[1].self_attn


@place
def mlp_shared_between_layers(model, monkeypatch, undo):
    model.model.layers[2].mlp = model.model.layers[1].mlp


@place
def rotary_buffer(model, monkeypatch, undo):
    model.model.rotary_emb.inv_freq.mul_(0.3)


@place
def rotary_buffer_kept_beside(model, monkeypatch, undo):
    rotary = model.model.rotary_emb
    rotary.original_inv_freq = rotary.original_inv_freq * 0.3
    rotary.inv_freq = rotary.inv_freq * 0.3


@place
def rotary_scaling(model, monkeypatch, undo):
    model.model.rotary_emb.attention_scaling *= 1.5


@place
def norm_eps(model, monkeypatch, undo):
    norm = part(model, "norm")
    for name in ("variance_epsilon", "eps"):
        if hasattr(norm, name):
            setattr(norm, name, 3.0)


@place
def activation_of_another_kind(model, monkeypatch, undo):
    if hasattr(part(model, "mlp"), "act_fn"):
        part(model, "mlp").act_fn = nn.ReLU()


@place
def final_norm_of_another_kind(model, monkeypatch, undo):
    model.model.norm = nn.Identity()


class Mixing(nn.Module):
    """Adds the mean over a sequence's rows."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, rows, *args, **kwargs):
        out = self.inner(rows, *args, **kwargs)
        return out + 0.3 * out.mean(1, keepdim=True) if isinstance(out, torch.Tensor) else changed(out)


@place
def mlp_that_mixes_rows(model, monkeypatch, undo):
    model.model.layers[1].mlp = Mixing(model.model.layers[1].mlp)


@place
def head_that_mixes_rows(model, monkeypatch, undo):
    model.lm_head = Mixing(model.lm_head)


class PerTensor(nn.Linear):
    """Rounds its input to 8 bits, with one scale for all rows."""

    def forward(self, input):
        scale = input.abs().amax() / 127
        return super().forward((input / scale).round() * scale)


@place
def output_projection_with_one_scale_for_all_rows(model, monkeypatch, undo):
    part(model, "attention").o_proj.__class__ = PerTensor


class Doubled(torch.Tensor):
    """A weight that counts twice in every product."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        out = super().__torch_function__(function, types, args, kwargs or {})
        return 2 * out.as_subclass(torch.Tensor) if function is nn.functional.linear else out


@place
def weight_of_another_class(model, monkeypatch, undo):
    linear = part(model, "attention").o_proj
    del linear.weight
    linear.weight = model.lm_head.weight.new_empty(0)  # An attribute, as a parameter has to be one.
    linear.weight = PLAIN(linear, model)


def PLAIN(linear, model):
    torch.manual_seed(5)
    weight = torch.randn(linear.out_features, linear.in_features, dtype=model.dtype) * 0.3
    return weight.as_subclass(Doubled)


@place
def weight_swapped_in_place(model, monkeypatch, undo):
    weight = part(model, "attention").o_proj.weight
    weight.data = weight.data.flip(0).clone()


@place
def weight_replaced(model, monkeypatch, undo):
    linear = part(model, "attention").o_proj
    linear.weight = nn.Parameter(linear.weight.detach().flip(0).clone())


@place
def weight_on_meta(model, monkeypatch, undo):
    linear = part(model, "attention").o_proj
    linear.weight = nn.Parameter(linear.weight.detach().to("meta"))


@place
def dtype_of_the_model(model, monkeypatch, undo):
    model.to(torch.float32)


@place
def head_with_more_rows(model, monkeypatch, undo):
    head = model.lm_head
    wider = nn.Linear(head.in_features, head.out_features + 5, bias=head.bias is not None).to(head.weight.dtype)
    with torch.no_grad():
        wider.weight[: head.out_features] = head.weight
        wider.weight[head.out_features :] = -head.weight[:5] * 1e-3
        if head.bias is not None:
            wider.bias.zero_()
            wider.bias[: head.out_features] = head.bias
    model.lm_head = wider


@place
def dropout_in_training_mode(model, monkeypatch, undo):
    model.train()
    part(model, "attention").attention_dropout = 0.5


@place
def one_module_in_training_mode(model, monkeypatch, undo):
    mlp = part(model, "mlp")
    mlp.add_module("own_dropout", nn.Dropout(0.5))
    mlp.own_dropout.train()
    old = mlp.forward
    mlp.forward = lambda *args, **kwargs: changed(old(*args, **kwargs))


@place
def adapters_in_the_layers(model, monkeypatch, undo):
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["o_proj"], init_lora_weights=False)).to(model.dtype).eval()
