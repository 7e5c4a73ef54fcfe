"""On a CPU, layers built of the package's ops: the bits of the blocks they stand for, and nothing attached is passed
over.
"""

import firp
import pytest
import torch
from firp.decoder import cpu_layers
from firp.decoder.few_row_modules import FewRowAttention, FewRowLayer
from models import tiny_model, tiny_predictor

from firp_kernels import registry

pytestmark = pytest.mark.skipif(
    registry.owner("joint_linear", "cpu") != "extension", reason="the C++ extension is not built"
)
PROMPTS = [torch.tensor([4, 5, 6, 4, 4, 5, 6, 5, 4]), torch.tensor([6, 5])]


def decoded(engine):
    """Cache after prefill, and of every step the model's scores, with the tree they belong to."""
    state = engine.start(PROMPTS, 12, [])
    state.keeps_scores = True
    yield state.cache[..., :1, :, :].clone()
    while not bool(state.finished.all()):
        yield state.tree.tokens
        yield engine.step(state).logits


def whole_layers(engine):
    return [isinstance(layer, FewRowLayer) for layer in engine.view.layers]


@pytest.mark.parametrize("whole_attention", [True, False])
@pytest.mark.parametrize("drafts", [True, False], ids=["firp", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "llama-llama3", "mistral", "qwen2", "qwen2-sliding"])
def test_whole_layers_have_the_bits_of_their_blocks(monkeypatch, family, dtype, drafts, whole_attention):
    """Against Hugging Face's own layer around replaced blocks, and around its own attention over replaced linears."""
    model = tiny_model(3, family, dtype=dtype)
    arguments = (tiny_predictor(model, 3), firp.TreeConfig(6, 3)) if drafts else ()
    engine = firp.Engine(model, *arguments)
    assert all(whole_layers(engine))
    monkeypatch.setattr(cpu_layers, "_is_layer", lambda *_: False)
    if not whole_attention:
        monkeypatch.setattr(cpu_layers, "_is_attention", lambda *_: False)
    # Of a model of its own: the layers of the first engine would serve the next one.
    blocks = firp.Engine(tiny_model(3, family, dtype=dtype), *arguments)
    assert (
        not any(whole_layers(blocks))
        and isinstance(blocks.view.layers[0].self_attn, FewRowAttention) == whole_attention
    )
    for ours, theirs in zip(decoded(engine), decoded(blocks), strict=True):
        assert torch.equal(ours, theirs)


def calls_in_a_step(engine):
    """How often a step takes its rows through layers in one call, and the scores of the first one."""
    seen, whole = [], engine._layer.whole
    if whole is not None:
        object.__setattr__(engine._layer, "whole", lambda *args: (seen.append(1), whole(*args))[1])
    steps = list(decoded(engine))[2::2]
    return len(seen) / len(steps), steps[0]


def test_a_step_is_one_call_where_its_layers_are_alike():
    """One below and one above the insertion layer where it drafts; none where an op was asked for by name."""
    model = tiny_model(3, dtype=torch.float32)
    calls, scores = calls_in_a_step(firp.Engine(model))
    named_calls, same = calls_in_a_step(firp.Engine(model, impl={"write_and_attend": "extension"}))
    assert (calls, named_calls) == (1, 0) and torch.equal(same, scores)
    assert 1 < calls_in_a_step(firp.Engine(model, tiny_predictor(model, 3), firp.TreeConfig(6, 3)))[0] <= 2


def another_scale(layer):
    layer.self_attn.scaling *= 2


def no_biases(layer):
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(layer.self_attn, name).bias = None


def an_output_bias(layer):
    layer.self_attn.o_proj.bias = torch.nn.Parameter(torch.ones(layer.self_attn.o_proj.out_features))


def another_epsilon(layer):
    layer.input_layernorm.variance_epsilon *= 100


def other_epsilons(layer):
    another_epsilon(layer)
    layer.post_attention_layernorm.variance_epsilon *= 100


@pytest.mark.parametrize("change", [another_scale, no_biases, an_output_bias, another_epsilon, other_epsilons])
def test_layers_that_differ_are_called_one_by_one(change):
    """Those of another window: the family qwen2-sliding above."""
    model = tiny_model(3, "qwen2", dtype=torch.float32)
    change(model.model.layers[1])
    calls, scores = calls_in_a_step(firp.Engine(model))
    _, same = calls_in_a_step(firp.Engine(model, impl={"write_and_attend": "extension"}))
    assert calls == 0 and torch.equal(same, scores)


def test_layers_of_other_kinds_keep_their_blocks():
    for family in ("qwen3", "llama-biases", "granite", "gemma"):
        assert not any(whole_layers(firp.Engine(tiny_model(1, family, dtype=torch.float32)))), family
    assert not any(whole_layers(firp.Engine(tiny_model(1))))
    assert not any(whole_layers(firp.Engine(tiny_model(1, dtype=torch.float32), impl="reference")))


PARTS = (
    "", ".self_attn", ".self_attn.k_proj", ".self_attn.o_proj", ".mlp", ".mlp.down_proj", ".input_layernorm",
    ".post_attention_layernorm",
)  # fmt: skip


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("part", PARTS)
def test_a_hook_on_any_part_of_a_layer_is_refused(part, hook):
    """It would see draft rows among the others, and a layer that is replaced would not call it."""
    model = tiny_model(2, dtype=torch.float32)
    getattr(model.get_submodule(f"model.layers.1{part}"), hook)(lambda *_: None)
    with pytest.raises(ValueError, match=f"model: 'model.layers.1{part}' has a forward hook, expected none"):
        firp.Engine(model)


@pytest.mark.parametrize("part", ["mlp", "mlp.up_proj", "self_attn.q_proj", "input_layernorm"])
def test_a_forward_of_its_own_is_refused(part):
    model = tiny_model(2, dtype=torch.float32)
    module = model.get_submodule(f"model.layers.1.{part}")
    module.forward = module.forward
    with pytest.raises(ValueError, match=f"model: 'model.layers.1.{part}' has its own forward"):
        firp.Engine(model)


def test_hidden_states_asked_for_earlier_leave_harmless_hooks():
    """Hugging Face leaves hooks of its own on the layers, which do nothing while nobody asks."""
    model = tiny_model(2, dtype=torch.float32)
    expected = firp.generate(model, PROMPTS[0][None], max_new_tokens=6, do_sample=False)
    model(PROMPTS[0][None], output_hidden_states=True)
    assert any(module._forward_hooks for module in model.modules())
    assert torch.equal(firp.generate(model, PROMPTS[0][None], max_new_tokens=6, do_sample=False), expected)


def test_linears_of_another_class_are_left_alone():
    class Linear(torch.nn.Linear):
        def forward(self, input):
            return super().forward(input) * 1.5

    model = tiny_model(2, dtype=torch.float32)
    attention = model.model.layers[2].self_attn
    attention.v_proj.__class__ = Linear
    engine = firp.Engine(model)
    assert whole_layers(engine) == [True, True, False, True]
    assert engine.view.layers[2].self_attn.v_proj is attention.v_proj


def test_linears_with_one_scale_for_all_activations_are_refused():
    model = tiny_model(2, dtype=torch.float32)
    attention = model.model.layers[2].self_attn
    attention.v_proj = torch.ao.nn.quantized.dynamic.Linear.from_float(_with_qconfig(attention.v_proj)).eval()
    with pytest.raises(
        ValueError, match=r"model: 'model.layers.2.self_attn.v_proj' \(Linear\) .* depends on the rows beside it"
    ):
        firp.Engine(model)


def _with_qconfig(linear):
    linear.qconfig = torch.ao.quantization.default_dynamic_qconfig
    return linear


def test_adapters_are_left_alone():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["v_proj"], layers_to_transform=[1], init_lora_weights=False)
    base = peft.get_peft_model(tiny_model(4, dtype=torch.float32), config).eval().get_base_model()
    engine = firp.Engine(base)
    assert whole_layers(engine) == [True, False, True, True]
    assert engine.view.layers[1].self_attn.v_proj is base.model.layers[1].self_attn.v_proj
