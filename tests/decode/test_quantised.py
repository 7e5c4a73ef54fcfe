"""bitsandbytes: its linears are modules of the layers, which layer views call as they are."""

import logging
import random

import firp
import pytest
import torch
from models import EOS, hf_alone, new_tokens, ragged_batch, tiny_model, tiny_predictor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (its wheels run on a CPU too)")
GREEDY = {"max_new_tokens": 20, "do_sample": False}
QUANTISED = {
    "int8": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4, scales quantised too": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": True,
    },
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model(1, vocab=11, dtype=torch.float32, hidden_size=64, intermediate_size=128).save_pretrained(folder)
    return folder


def load(folder, dtype, **quantisation):
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    config = BitsAndBytesConfig(**quantisation)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype, device_map={"": "cpu"})


def assert_own_choices(model, sequences, prompt_length, mask):
    """Every new token is Hugging Face's argmax after those before it, or nearly ties with it: rows of other numbers
    round otherwise, and a quantised linear makes more of that than float32 would."""
    for row, keep in zip(sequences, mask.bool(), strict=True):
        tokens, start = torch.cat([row[:prompt_length][keep], row[prompt_length:]]), int(keep.sum())
        if EOS in tokens[start:]:
            tokens = tokens[: start + tokens[start:].tolist().index(EOS) + 1]
        with torch.no_grad():
            scores = model(tokens[None]).logits[0, start - 1 : -1].float()
        chosen = scores.gather(1, tokens[start:, None])[:, 0]
        assert float((scores.amax(1) - chosen).max()) < 0.05 * float(scores.std())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantisation", QUANTISED.values(), ids=QUANTISED)
def test_a_quantised_base_gives_its_own_output(saved, quantisation, dtype):
    """Drafts change no token, and the tokens are those of the same quantised model in Hugging Face."""
    plain, model = AutoModelForCausalLM.from_pretrained(saved), load(saved, dtype, **quantisation)
    assert isinstance(model.model.layers[0].mlp.up_proj, (bitsandbytes.nn.Linear8bitLt, bitsandbytes.nn.Linear4bit))
    changed = accepted = 0
    for seed in range(3):
        ids, mask = ragged_batch(random.Random(seed), 3, 11)
        drafts = {"predictor": tiny_predictor(plain, seed), "tree": firp.TreeConfig(8, 3)}
        out = firp.generate(model, ids, attention_mask=mask, **drafts, **GREEDY, return_dict_in_generate=True)
        assert torch.equal(out.sequences, firp.generate(model, ids, attention_mask=mask, **GREEDY))
        assert_own_choices(model, out.sequences, ids.shape[1], mask)
        changed += new_tokens(out.sequences, ids.shape[1]) != hf_alone(plain, ids, mask, **GREEDY)
        accepted += out.stats.tokens - out.stats.steps
    assert changed and accepted > 10


def test_adapters_over_a_quantised_base(saved):
    peft = pytest.importorskip("peft")
    base = load(saved, torch.float32, **QUANTISED["nf4"])
    ids, mask = ragged_batch(random.Random(1), 3, 11)
    before = firp.generate(base, ids, attention_mask=mask, **GREEDY)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base, config).eval()
    drafts = {"predictor": tiny_predictor(model.get_base_model(), 1), "tree": firp.TreeConfig(8, 3)}
    out, alone = (firp.generate(model, ids, attention_mask=mask, **GREEDY, **given) for given in (drafts, {}))
    assert torch.equal(out, alone) and not torch.equal(out, before)
    assert_own_choices(model, out, ids.shape[1], mask)
