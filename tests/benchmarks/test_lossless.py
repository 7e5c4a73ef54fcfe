"""The check of answers against one forward: it passes the model's own answers and no others."""

import json

import firp
import pytest
import torch
from api_server import write_chat_model
from models import tiny_model, tiny_predictor

from benchmarks import lossless

PROMPTS = [torch.tensor(ids) for ids in ([4, 9, 6], [1, 2, 1, 2, 1, 2], [7])]


@pytest.fixture
def model():
    model = tiny_model(1, vocab=11)
    model.generation_config.eos_token_id = [3, 5]
    return model


@pytest.mark.parametrize("limit", [1, 12])
def test_the_models_own_answers_pass(model, limit):
    engine = firp.Engine(model, tiny_predictor(model, 1), firp.TreeConfig(8, 3))
    for prompt in PROMPTS:
        found = lossless.compared(engine, model, prompt, limit)
        expected = model.generate(prompt[None], max_new_tokens=limit, do_sample=False)
        assert found["equal"] and found["forward"] and found["gap"] > 0
        assert found["tokens"] == expected.shape[1] - len(prompt)


def test_the_answers_of_another_model_do_not(model):
    engine, other = firp.Engine(tiny_model(2, vocab=11)), model
    other.generation_config.eos_token_id = None
    assert not any(lossless.compared(engine, other, prompt, 12)["equal"] for prompt in PROMPTS)


@pytest.mark.parametrize("spoil", ["cut", "past its end"])
def test_an_answer_ends_where_decoding_ends_it(model, monkeypatch, spoil):
    """Its tokens are all the argmax; there are too few, or too many."""
    model.generation_config.eos_token_id = None
    engine, prompt, generate = firp.Engine(model), PROMPTS[0], firp.generate
    answer = generate(model, prompt[None], engine=engine, max_new_tokens=12, do_sample=False)[0, len(prompt) :]
    if spoil == "cut":

        def spoiled(*args, max_new_tokens, **options):
            return generate(*args, max_new_tokens=max_new_tokens - 1, **options)

        monkeypatch.setattr(firp, "generate", spoiled)
    else:
        first = answer.tolist().index(answer[3])
        judge = tiny_model(1, vocab=11)
        judge.generation_config.eos_token_id = int(answer[first])
    found = lossless.compared(engine, model if spoil == "cut" else judge, prompt, 12)
    assert not found["forward"] and not found["equal"]


def test_a_near_tie_is_decoded_by_the_judge(model, monkeypatch):
    """Where the forward alone does not show it, generate decides."""
    monkeypatch.setattr(lossless, "_ends", lambda *_: False)
    found = lossless.compared(firp.Engine(model), model, PROMPTS[0], 12)
    assert found["equal"] and not found["forward"]


def test_the_command_goes_on_where_it_was_and_fails_where_an_answer_differs(tmp_path, capsys, monkeypatch):
    prompts, path = tmp_path / "prompts.jsonl", tmp_path / "lossless.json"
    named = {"model": str(write_chat_model(tmp_path)), "predictor": str(tmp_path / "predictor")}
    prompts.write_text("".join(json.dumps({"id": "twice", "category": c, "prompt": "Say yes."}) + "\n" for c in "abb"))
    found = iter([True, KeyboardInterrupt, True, False])

    def compared(*_):
        equal = next(found)
        if equal is KeyboardInterrupt:
            raise equal
        return {"tokens": 3, "steps": 2, "delivered": 3, "equal": equal, "forward": equal, "gap": 0.5}

    monkeypatch.setattr(lossless, "compared", compared)
    with pytest.raises(KeyboardInterrupt):
        lossless.main(prompts, path, **named)
    with pytest.raises(SystemExit, match="1"):
        lossless.main(prompts, path, **named)
    parts = json.loads(path.read_text())["parts"]
    assert {name: len(part["figures"]["answers"]) for name, part in parts.items()} == {"a": 1, "b": 2}
    assert "all: 2 of 3 answers are the model's own, 9 tokens, tau 1.500" in capsys.readouterr().out


def test_a_dtype_that_rounds_too_much_is_named():
    with pytest.raises(ValueError, match="dtype: got 'bfloat16', expected float32 or float64"):
        lossless.main(dtype="bfloat16")
