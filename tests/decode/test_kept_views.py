"""Layer views serve the next engine of a model while the model stays as it is, and never after."""

import gc
import weakref

import firp
import pytest
import torch
from models import tiny_model, tiny_predictor
from torch import nn

from firp_kernels import registry


def layers(model, predictor=None, **settings):
    return firp.Engine(model, predictor, None if predictor is None else firp.TreeConfig(4, 2), **settings).view.layers


def answer(model, predictor):
    options = {"max_new_tokens": 12, "do_sample": False}
    prompt = torch.tensor([[4, 5, 6]])
    found = firp.generate(model, prompt, predictor=predictor, tree=firp.TreeConfig(4, 2), **options)
    assert torch.equal(found, model.generate(prompt, **options, pad_token_id=0))
    return found


def other_weight(model):
    linear = model.model.layers[1].mlp.up_proj
    linear.weight = nn.Parameter(linear.weight.detach().flip(0))


def other_module(model):
    attention = model.model.layers[0].self_attn
    attention.q_proj = nn.Linear(*attention.q_proj.weight.shape[::-1], bias=False, dtype=model.dtype)


def other_setting(model):
    model.model.layers[1].self_attn.scaling *= 0.5


def fewer_layers(model):
    model.model.layers = model.model.layers[:-1]
    model.config.num_hidden_layers -= 1


pytestmark = pytest.mark.skipif(
    registry.owner("joint_linear", "cpu") != "extension", reason="the C++ extension is not built"
)


def test_engines_share_the_views_of_a_model():
    model, other = tiny_model(0, dtype=torch.float32), tiny_model(0, dtype=torch.float32)
    predictor = tiny_predictor(model, 0)
    first, again = layers(model), layers(model, predictor)
    assert len(first) == len(again) and all(a is b for a, b in zip(first, again, strict=True))
    assert first is not again and first[0] is not layers(other)[0]
    assert layers(model, impl={"tree_attention": "reference"})[0] is not first[0]
    assert layers(model, impl="reference")[0] is not first[0] and layers(model)[0] is first[0]


@pytest.mark.parametrize("change", [other_weight, other_module, other_setting])
def test_a_changed_model_has_new_views(change):
    model = tiny_model(1, dtype=torch.float32)
    predictor = tiny_predictor(model, 1)
    first, _ = layers(model), answer(model, predictor)
    change(model)
    answer(model, predictor)
    assert layers(model)[0] is not first[0]


def test_weights_written_in_place_are_read_as_they_are():
    model = tiny_model(2, dtype=torch.float32)
    predictor = tiny_predictor(model, 2)
    before = answer(model, predictor)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.neg_()
        model.model.layers[1].self_attn.v_proj.weight.mul_(3)
    assert not torch.equal(before, answer(model, predictor))


def test_fewer_layers():
    model = tiny_model(3, dtype=torch.float32)
    assert len(layers(model)) == 1 + len((fewer_layers(model), layers(model))[1])


def test_views_die_with_their_model():
    model = tiny_model(4, dtype=torch.float32)
    held = weakref.ref(layers(model)[0]), weakref.ref(model.model.layers[0].mlp)
    del model
    gc.collect()
    assert [reference() for reference in held] == [None, None]
