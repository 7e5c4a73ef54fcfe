"""Places that hold values or modules: configuration, layers, buffers, weights, modes, adapters."""

from __future__ import annotations

import pytest
import torch
from places import PLACES, changed, part, place
from torch import nn

__all__ = ["PLACES"]


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
    peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["o_proj"], init_lora_weights=False)).to(
        model.dtype
    ).eval()


@place
def activation_over_rows(model, monkeypatch, undo):
    if hasattr(part(model, "mlp"), "act_fn"):
        part(model, "mlp").act_fn = nn.Softmax(1)


@place
def default_device(model, monkeypatch, undo):
    undo.enter_context(torch.device("meta"))


@place
def attention_groups(model, monkeypatch, undo):
    part(model, "attention").num_key_value_groups = 1


@place
def attention_head_dim(model, monkeypatch, undo):
    part(model, "attention").head_dim = 4


@place
def config_hidden_size(model, monkeypatch, undo):
    model.config.hidden_size = 64


@place
def config_return_dict(model, monkeypatch, undo):
    model.config.return_dict = False


@place
def layers_that_slide(model, monkeypatch, undo):
    if hasattr(model.model, "has_sliding_layers"):
        model.model.has_sliding_layers = not model.model.has_sliding_layers
