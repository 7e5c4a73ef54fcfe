"""One product for queries, keys and values, and one for gate and up, on a GPU made of CPU tensors."""

from types import SimpleNamespace

import firp
import pytest
import torch
from captured_runs import LONG, SHORT, captured, emitted, parts
from fake_cuda import FakeCuda
from firp.decoder.joint_linears import JointLinears
from firp.decoder.model_rules import head_counts
from firp.decoder.view import make_layer_view, view_config
from models import tiny_model, tiny_predictor


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda(monkeypatch)
    with fake.tensors():
        yield fake


JOINABLE = ["llama", "mistral", "qwen2", "qwen3"]


def stand_ins(engine):
    return [
        type(module).__name__ for layer in engine.view.layers for module in (layer.self_attn, layer.mlp)
        if type(module).__name__.startswith("Joint")
    ]  # fmt: skip


@pytest.mark.parametrize("family", [*JOINABLE, "gemma"])
def test_joint_linears_give_the_models_own_tokens(cuda, family):
    model = tiny_model(11, family, vocab=12, dtype=torch.float32)
    engine = firp.Engine(model, tiny_predictor(model, 11), firp.TreeConfig(8, 3), compile=False)
    own = firp.Engine(model, impl="reference")
    kinds = {"gemma": set(), "qwen3": {"JointMLP"}}.get(family, {"JointAttention", "JointMLP"})
    assert set(stand_ins(engine)) == kinds and not stand_ins(own)
    for prompts in (SHORT, LONG):
        assert emitted(engine, prompts, 20) == emitted(own, prompts, 20, late=False)
    assert not any(type(module).__name__.startswith("Joint") for module in model.modules())


ROTATING = ("llama", "llama-biases", "llama-dynamic", "mistral", "qwen2-sliding")
# Rotate a part of each head, pairs that lie side by side, or normed rows.
OTHERS = ("phi3", "glm", "ernie4_5", "cohere", "qwen3")


@pytest.mark.parametrize("family", ROTATING + OTHERS)
def test_attention_rotates_where_heads_are_rotated_whole(cuda, family):
    """All others rotate by themselves, and the op gets no cosines."""
    model = tiny_model(11, family, vocab=12, dtype=torch.float32)
    engine = firp.Engine(model, tiny_predictor(model, 11), firp.TreeConfig(8, 3), compile=False, graphs=False)
    op, given = engine.ops.write_and_attend, []
    engine.ops.write_and_attend = lambda *args: given.append(len(args)) or op(*args)
    own = firp.Engine(model, impl="reference")
    assert emitted(engine, SHORT, 6) == emitted(own, SHORT, 6, late=False)
    assert set(given) == {13 if family in ROTATING else 11}


@pytest.mark.parametrize("through_data", [False, True])
def test_weights_changed_in_place_are_those_of_the_next_run(cuda, through_data):
    """Written through `data` too, of which torch keeps no count."""
    model, *others = parts()
    engine = captured(model, *others)
    before = emitted(engine, LONG)
    for layer in model.model.layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.v_proj, layer.mlp.up_proj):
            with torch.no_grad():
                (linear.weight.data if through_data else linear.weight).mul_(-1.5)
    graphs = dict(engine._spare[0].graphs)
    wanted = emitted(firp.Engine(model, impl="reference"), LONG, late=False)
    assert emitted(engine, LONG) == wanted != before
    assert dict(engine._spare[0].graphs) == graphs


def test_copies_that_take_too_much_are_left_off(cuda, monkeypatch):
    model = tiny_model(7, vocab=12)
    names = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    weights = {name: parameter for name, parameter in model.named_parameters() if name.split(".")[-2] in names}
    bytes_copied = sum(weight.nbytes for weight in weights.values())
    for free, joined in ((4 * bytes_copied, True), (4 * bytes_copied - 4, False)):
        monkeypatch.setattr("firp.decoder.joint_linears.available_memory", lambda device, free=free: free)
        assert bool(stand_ins(firp.Engine(model, compile=False))) == joined


def test_linears_that_are_not_plain_stay(cuda):
    model = tiny_model(7, vocab=12)
    model.model.layers[0].self_attn.q_proj.to(torch.bfloat16)
    model.model.layers[1].mlp.up_proj = type("Adapted", (torch.nn.Linear,), {})(32, 64, bias=False)
    config = view_config(model.config)
    layers = [
        make_layer_view(layer, i, None, head_counts(model.config), config) for i, layer in enumerate(model.model.layers)
    ]
    JointLinears(SimpleNamespace(device=torch.device("cuda"), layers=layers))
    kinds = [(type(layer.self_attn).__name__, type(layer.mlp).__name__) for layer in layers]
    assert kinds[:2] == [("LlamaAttention", "JointMLP"), ("JointAttention", "LlamaMLP")]
