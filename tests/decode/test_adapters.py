"""LoRA through peft: adapters live in the layers, and layer views share the layers."""

import random
import re

import firp
import pytest
import torch
from models import hf_alone, new_tokens, ragged_batch, tiny_model, tiny_predictor

peft = pytest.importorskip("peft")
GREEDY = {"max_new_tokens": 14, "do_sample": False}


def adapted():
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    return peft.get_peft_model(tiny_model(4, "llama", vocab=11), config).to(torch.float64).eval()


def test_the_adapters_are_active():
    model = adapted()
    base = model.get_base_model()
    ids, mask = ragged_batch(random.Random(4), 3, 11)
    expected = hf_alone(model, ids, mask, **GREEDY)
    with model.disable_adapter():
        assert hf_alone(model, ids, mask, **GREEDY) != expected
    predictor = tiny_predictor(base, 4)
    for given in (model, base):
        out = firp.generate(given, ids, attention_mask=mask, predictor=predictor, **GREEDY)
        assert new_tokens(out, ids.shape[1]) == expected
    engine = firp.Engine(base, predictor)
    assert torch.equal(firp.generate(model, ids, attention_mask=mask, engine=engine, **GREEDY), out)


def test_an_engine_takes_the_decoder_inside():
    with pytest.raises(ValueError, match=re.escape("model: got PeftModel, expected the decoder inside it: pass model.get_base_model()")):
        firp.Engine(adapted())


def test_learned_prompts_are_refused():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(tiny_model(4, "llama", vocab=11), config)
    with pytest.raises(ValueError, match="model: got a peft model of type PROMPT_TUNING, expected adapters inside the layers"):
        firp.generate(model, torch.tensor([[4, 5]]), **GREEDY)


def test_an_engine_sees_that_its_model_was_changed():
    """Its views would go on with the old modules: adapters, hooks or embeddings put in later would be ignored."""
    model = tiny_model(4, "llama", vocab=11)
    ids = torch.tensor([[4, 5, 6]])

    def refused(engine, name):
        with pytest.raises(ValueError) as caught:
            firp.generate(model, ids, engine=engine, **GREEDY)
        assert str(caught.value) == f"engine: the model's {name!r} was replaced or hooked after the engine was made, expected a new Engine"

    engine = firp.Engine(model)
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    refused(engine, "model.layers.1.mlp")
    handle.remove()
    projection = model.model.layers[2].mlp.up_proj
    weight, projection.weight = projection.weight, torch.nn.Parameter(projection.weight.detach().clone())
    refused(engine, "model.layers.2.mlp.up_proj")
    projection.weight = weight
    expected = firp.generate(model, ids, engine=engine, **GREEDY)
    config = peft.LoraConfig(r=4, target_modules=["model.layers.2.self_attn.o_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).to(torch.float64)
    with pytest.raises(ValueError, match=r"engine: the model's 'model.layers.2.self_attn.o_proj"):
        firp.generate(adapted, ids, engine=engine, **GREEDY)
    assert torch.equal(firp.generate(adapted, ids, engine=firp.Engine(model), **GREEDY), model.generate(ids, **GREEDY))
    with adapted.disable_adapter():
        assert torch.equal(firp.generate(adapted, ids, **GREEDY), expected)
