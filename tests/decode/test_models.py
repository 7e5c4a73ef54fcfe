"""Every model type that is accepted gives its own output; every other kind of model is refused by name."""

import random
import re
from pathlib import Path

import firp
import pytest
import torch
from firp.decoder.view import SUPPORTED_MODEL_TYPES, SUPPORTED_ROPE_TYPES
from models import EOS, FAMILIES, PAD, hf_alone, new_tokens, ragged_batch, random_tree, tiny_model, tiny_predictor
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

DOCS = Path(__file__).parents[2] / "docs/models.md"
GREEDY = {"max_new_tokens": 14, "do_sample": False}


@pytest.mark.parametrize("family", FAMILIES)
def test_eight_ragged_prompts_equal_eight_single_runs(family):
    """float64: tokens of every sequence and scores of one, over two trees; prompts cross sliding windows and RoPE
    switches.
    """
    rng = random.Random(family)
    model = tiny_model(5, family, vocab=11)
    ids, mask = ragged_batch(rng, 8, 11)
    expected = hf_alone(model, ids, mask, **GREEDY)
    scores = model.generate(
        ids[-1:], attention_mask=mask[-1:], return_dict_in_generate=True, output_logits=True, **GREEDY
    ).logits
    assert len({tuple(row) for row in expected}) > 1
    for run in range(2):
        predictor = tiny_predictor(model, run, num_offsets=rng.randint(1, 3), layer=rng.randint(1, 3))
        out = firp.generate(
            model, ids, attention_mask=mask, predictor=predictor, tree=random_tree(rng, predictor.num_offsets),
            return_dict_in_generate=True, output_logits=True, **GREEDY,
        )  # fmt: skip
        assert new_tokens(out.sequences, ids.shape[1]) == expected
        for ours, theirs in zip(out.logits, scores, strict=False):
            torch.testing.assert_close(ours[-1], theirs[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama-dynamic", "llama-longrope"])
@pytest.mark.parametrize("length", [10, 15, 16, 17, 30])
def test_frequencies_follow_the_committed_length(family, length):
    """Prompts and outputs on both sides of the trained 16 tokens; the model's buffers are never written."""
    ids = torch.randint(4, 11, (1, length), generator=torch.Generator().manual_seed(length))
    expected = tiny_model(3, family, vocab=11).generate(ids, max_new_tokens=20, do_sample=False)
    model = tiny_model(3, family, vocab=11)
    before = model.model.rotary_emb.inv_freq.clone()
    for seed in range(2):
        out = firp.generate(
            model,
            ids,
            predictor=tiny_predictor(model, seed),
            tree=firp.TreeConfig(8, 4),
            max_new_tokens=20,
            do_sample=False,
        )
        assert torch.equal(out, expected)
    assert torch.equal(model.model.rotary_emb.inv_freq, before)


def test_a_phi3_request_across_its_switch_is_refused():
    model = tiny_model(3, "phi3-longrope", vocab=11)
    with pytest.raises(ValueError, match=re.escape("max_new_tokens: got 20, expected at most 4: past 64 tokens Phi-3")):
        firp.generate(model, torch.full((1, 60), 5), max_new_tokens=20, do_sample=False)
    ids = torch.randint(4, 11, (1, 70), generator=torch.Generator().manual_seed(1))
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(firp.generate(model, ids, predictor=tiny_predictor(model, 1), **GREEDY), expected)


def test_every_accepted_type_is_tested():
    assert {model_type for model_type, _ in FAMILIES.values()} == set(SUPPORTED_MODEL_TYPES)
    ropes = {extra.get("rope_parameters", {}).get("rope_type", "default") for _, extra in FAMILIES.values()}
    assert ropes == set(SUPPORTED_ROPE_TYPES)


def test_the_documents_table_lists_every_accepted_type():
    table = DOCS.read_text()
    for model_type in SUPPORTED_MODEL_TYPES:
        assert f"`{model_type}`" in table, model_type


REFUSED = {
    "gemma2": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8},
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "olmo3": {},
    "stablelm": {},
    "diffllama": {},
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_other_types_are_refused_by_name(model_type):
    config = AutoConfig.for_model(
        model_type, vocab_size=11, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=EOS, pad_token_id=PAD, **REFUSED[model_type],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(
        ValueError, match=f"with model_type '{model_type}', expected a causal decoder of type apertus, arcee"
    ):
        firp.generate(model, torch.tensor([[4, 5]]), **GREEDY)


def test_a_layer_that_overrides_its_class_is_refused():
    model = tiny_model(1, "llama")
    attention = model.model.layers[2].self_attn

    class Softcapped(type(attention)):
        def forward(self, *args, **kwargs):
            return super().forward(*args, softcap=30.0, **kwargs)

    attention.__class__ = Softcapped
    with pytest.raises(ValueError, match=r"model: 'model.layers.2.self_attn' is Softcapped, which overrides forward"):
        firp.generate(model, torch.tensor([[4, 5, 6]]), **GREEDY)


@pytest.mark.parametrize("part", ["layer", "attention"])
def test_forwards_bound_to_the_instance_are_refused(part):
    """As accelerate binds them for device_map: they would call the user's modules and bypass the views."""
    model = tiny_model(1, "llama")
    layer = model.model.layers[1]
    module = layer if part == "layer" else layer.self_attn
    module.forward = module.forward
    with pytest.raises(
        ValueError, match=r"model: 'model.layers.1(.self_attn)?' has its own forward \(accelerate's device_map"
    ):
        firp.generate(model, torch.tensor([[4, 5]]), **GREEDY)


def test_a_model_in_training_mode_with_dropout_is_refused():
    model = tiny_model(1, "llama").train()
    expected = firp.generate(model, torch.tensor([[4, 5]]), **GREEDY)
    assert torch.equal(expected, model.eval().generate(torch.tensor([[4, 5]]), **GREEDY))
    model.train().model.layers[0].self_attn.attention_dropout = 0.5
    with pytest.raises(
        ValueError, match=r"model: 'model.layers.0.self_attn' is in training mode with attention_dropout 0.5"
    ):
        firp.generate(model, torch.tensor([[4, 5]]), **GREEDY)


def test_outliers_over_all_rows_are_refused():
    """bitsandbytes' 8 bit as it is by default: a row's result depends on the rows beside it."""
    model = tiny_model(1, "llama")
    model.config.quantization_config = BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(
        ValueError,
        match=re.escape("model: got llm_int8_threshold 6.0, expected 0.0: its 8-bit linears look for outliers"),
    ):
        firp.generate(model, torch.tensor([[4, 5]]), **GREEDY)


def test_models_of_another_build_are_refused():
    with pytest.raises(
        ValueError, match="model: got GPT2LMHeadModel with model_type 'gpt2', expected a causal decoder"
    ):
        firp.generate(
            GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=9)), torch.tensor([[1]]), **GREEDY
        )
