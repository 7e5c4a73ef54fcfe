"""LoRA through peft: adapters live in the layers, and layer views share the layers."""

import random
import re

import firp
import pytest
import torch
from firp.decoder.peft_models import TESTED_TYPES
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
    with pytest.raises(
        ValueError, match=re.escape("model: got PeftModel, expected the decoder inside it: pass model.get_base_model()")
    ):
        firp.Engine(adapted())


def test_learned_prompts_are_refused():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(tiny_model(4, "llama", vocab=11), config)
    with pytest.raises(
        ValueError, match="model: got a peft model of type PROMPT_TUNING, expected adapters inside the layers"
    ):
        firp.generate(model, torch.tensor([[4, 5]]), **GREEDY)


def test_an_engine_sees_that_its_model_was_changed():
    """Its views would go on with the old modules: adapters, hooks or embeddings put in later would be ignored."""
    model = tiny_model(4, "llama", vocab=11)
    ids = torch.tensor([[4, 5, 6]])

    def refused(model, engine, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            firp.generate(model, ids, engine=engine, **GREEDY)

    engine = firp.Engine(model)
    projection = model.model.layers[2].mlp.up_proj
    weight, projection.weight = projection.weight, torch.nn.Parameter(projection.weight.detach().clone())
    changed = "engine: the model changed after the engine was made"
    refused(
        model,
        engine,
        f"{changed} (a parameter of 'model.layers.2.mlp.up_proj', its dtype or its device), expected a new Engine",
    )
    projection.weight = weight
    expected = firp.generate(model, ids, engine=engine, **GREEDY)
    model.model.layers[1].input_layernorm.variance_epsilon = 0.5
    refused(
        model,
        engine,
        f"{changed} (attribute variance_epsilon of 'model.layers.1.input_layernorm'), expected a new Engine",
    )
    model.model.layers[1].input_layernorm.variance_epsilon = 1e-6
    config = peft.LoraConfig(r=4, target_modules=["model.layers.2.self_attn.o_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).to(torch.float64)
    refused(adapted, engine, f"{changed} (modules of 'model.layers.2.self_attn'), expected a new Engine")
    assert torch.equal(firp.generate(adapted, ids, engine=firp.Engine(model), **GREEDY), model.generate(ids, **GREEDY))
    with adapted.disable_adapter():
        assert torch.equal(firp.generate(adapted, ids, **GREEDY), expected)


TARGETS = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
KINDS = {
    "lora": lambda: peft.LoraConfig(r=4, init_lora_weights=False, **TARGETS),
    "dora": lambda: peft.LoraConfig(r=4, use_dora=True, init_lora_weights=False, **TARGETS),
    "lora on embeddings and head": lambda: peft.LoraConfig(
        r=4, init_lora_weights=False, target_modules=["embed_tokens", "lm_head"]
    ),
    "modules to save": lambda: peft.LoraConfig(
        r=4, init_lora_weights=False, target_modules=["q_proj"], modules_to_save=["lm_head"]
    ),
    "adalora": lambda: peft.AdaLoraConfig(init_r=6, target_r=4, total_step=10, init_lora_weights=False, **TARGETS),
    "loha": lambda: peft.LoHaConfig(r=4, init_weights=False, **TARGETS),
    "lokr": lambda: peft.LoKrConfig(r=4, init_weights=False, **TARGETS),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
    "oft": lambda: peft.OFTConfig(r=4, oft_block_size=0, init_weights=False, **TARGETS),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, init_weights=False, **TARGETS),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["q_proj"], init_weights=False),
    "hra": lambda: peft.HRAConfig(r=4, init_weights=False, **TARGETS),
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=20, init_weights=False, target_modules=["q_proj"]),
    "layer norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "miss": lambda: peft.MissConfig(r=4, init_weights=False, **TARGETS),
    "c3a": lambda: peft.C3AConfig(block_size=8, init_weights="gaussian", target_modules=["q_proj"]),
    "shira": lambda: peft.ShiraConfig(r=4, init_weights=False, **TARGETS),
    "randlora": lambda: peft.RandLoraConfig(r=4, init_weights=False, **TARGETS),
    "road": lambda: peft.RoadConfig(group_size=8, init_weights=False, **TARGETS),
    "trainable tokens": lambda: peft.TrainableTokensConfig(
        token_indices=[4, 5], init_weights=False, target_modules=["embed_tokens"]
    ),
    "vblora": lambda: peft.VBLoRAConfig(r=4, num_vectors=20, vector_length=8, target_modules=["q_proj"]),
    "waveft": lambda: peft.WaveFTConfig(n_frequency=20, target_modules=["q_proj"], init_weights=False),
    "delora": lambda: peft.DeloraConfig(r=4, init_weights=False, **TARGETS),
    "osf": lambda: peft.OSFConfig(target_modules=["q_proj"]),
    "gralora": lambda: peft.GraloraConfig(r=4, gralora_k=2, init_weights=False, **TARGETS),
}


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_every_accepted_type_run_as_in_peft(kind):
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_model(4, "llama", vocab=11), KINDS[kind]()).to(torch.float64).eval()
    ids, mask = ragged_batch(random.Random(4), 3, 11)
    drafts = {"predictor": tiny_predictor(model.get_base_model(), 4), "tree": firp.TreeConfig(8, 3)}
    out = firp.generate(model, ids, attention_mask=mask, **drafts, **GREEDY)
    assert new_tokens(out, ids.shape[1]) == hf_alone(model, ids, mask, **GREEDY)


def test_every_accepted_type_is_tested():
    assert {KINDS[kind]().peft_type.value for kind in KINDS} == TESTED_TYPES


REFUSED = {
    "adapter_names": ({}, {"adapter_names": ["default"]}, "adapter_names: got list, expected None"),
    "task_ids": ({}, {"task_ids": torch.tensor([0])}, "task_ids: got Tensor, expected None"),
    "alora_offsets": ({}, {"alora_offsets": [1]}, "alora_offsets: got list, expected None"),
    "activated": ({"alora_invocation_tokens": [5]}, {}, "model: got a peft model with alora_invocation_tokens"),
    "dropout": ({"lora_dropout": 0.3}, {}, "is in training mode with p 0.3, expected model.eval()"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_does_for_one_call_is_refused_by_name(case):
    settings, options, message = REFUSED[case]
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(tiny_model(4, "llama", vocab=11), config).to(torch.float64).train(case == "dropout")
    drafts = {"predictor": tiny_predictor(model.get_base_model(), 4)}
    with pytest.raises(ValueError, match=re.escape(message)):
        firp.generate(model, torch.tensor([[4, 5]]), **drafts, **options, **GREEDY)


def test_adapter_names_through_the_hook_are_refused():
    model = adapted()
    call = {
        "input_ids": torch.tensor([[4, 5]]),
        "adapter_names": ["__base__"],
        "custom_generate": firp.decode,
        **GREEDY,
    }
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_model(4, "llama", vocab=11), config).to(torch.float64).eval()
    with pytest.raises(ValueError, match=r"model: 'model.layers.0.self_attn.q_proj' has a forward hook, expected none"):
        model.generate(**call)


@pytest.mark.parametrize("change", ["hook", "forward", "subclass"])
def test_a_peft_model_that_was_changed_is_refused(change):
    model = adapted()
    if change == "hook":
        model.register_forward_hook(lambda *_: None)
    elif change == "forward":
        model.base_model.forward = model.base_model.forward
    else:
        model.__class__ = type("Own", (type(model),), {"forward": lambda self, **_: None})
    with pytest.raises(ValueError, match=r"model: .*(hook|its own forward|overrides forward)"):
        firp.generate(model, torch.tensor([[4, 5]]), **GREEDY)
