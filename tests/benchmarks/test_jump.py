"""The jump drafter of `economize`: trained, decoded and counted here; skipped by name where it is not installed."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from firp.tools.files import locked
from models import hf_alone, tiny_model

from benchmarks.baselines import jump

installed = pytest.mark.skipif(importlib.util.find_spec("economize") is None, reason=jump.SKIPPED)


class Tokenizer:
    chat_template = None

    def __call__(self, text):
        return type("Encoding", (), {"input_ids": [4 + ord(letter) % 3 for letter in text][:9]})


@pytest.fixture
def model(monkeypatch):
    model = tiny_model(1, dtype=torch.float32, num_hidden_layers=6)
    monkeypatch.setattr("firp.load_model", lambda *_: (model, Tokenizer()))
    return model


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 40, 24)
    path = tmp_path / "data.npz"
    np.savez(
        path,
        tokens=rng.integers(4, 7, lengths.sum()).astype(np.uint16),
        offsets=np.concatenate([[0], lengths.cumsum()]),
        prompt_lengths=np.full(24, 4, np.int32),
    )
    return path


def options(tmp_path, data, **changes):
    return {
        "data": data, "output": tmp_path / "jump", "model": "tiny", "steps": 3, "batch_size": 4, "max_length": 32,
        "held_out": 4, "predictor": "linear", "adaptation": "full", "cycle_lengths": "1,3", "limit": 3,
        "max_new_tokens": 12, "prompts": jump.OWN_PROMPTS, "seed": 0, "dtype": "float32", "device": "cpu", **changes,
    }  # fmt: skip


def test_it_is_skipped_by_name(monkeypatch, capsys, tmp_path, data):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    jump.main(**options(tmp_path, data))
    assert capsys.readouterr().out == "skipped: economize is not installed; pip install --no-deps economize==0.3.2\n"


@installed
def test_it_is_trained_decoded_and_counted(model, tmp_path, data, capsys):
    jump.main(**options(tmp_path, data))
    document = json.loads((tmp_path / "jump/jump.json").read_text())
    plain, drafted = document["cycle_lengths"]["1"], document["cycle_lengths"]["3"]
    assert plain["tau"] == plain["forwards_per_token"] == plain["tokens_per_forward_of_layers"] == 1.0
    assert plain["draft_steps"] == 0 < drafted["draft_steps"]
    # A draft step passes one layer of six.
    passes = drafted["exact_passes"] * 6 + drafted["draft_steps"]
    assert drafted["forwards_per_token"] == pytest.approx(passes / 6 / drafted["tokens"])
    assert drafted["tau"] == drafted["tokens"] / drafted["exact_passes"] >= 1
    assert document["training"]["steps"] == 3 and document["settings"]["target_layer"] == 4
    jump.main(**options(tmp_path, data))  # a finished run is not trained again
    assert json.loads((tmp_path / "jump/jump.json").read_text())["cycle_lengths"] == document["cycle_lengths"]


@installed
def test_a_second_process_is_refused(model, tmp_path, data):
    (tmp_path / "jump").mkdir()
    with locked(tmp_path / "jump"), pytest.raises(BlockingIOError, match="another process is at work in it"):
        jump.main(**options(tmp_path, data))


def test_steps_that_were_taken_again_are_told_once(tmp_path):
    lines = [{"step": step, "loss": loss} for step, loss in ((0, 9.0), (50, 5.0), (100, 4.0), (50, 5.5), (100, 4.5))]
    (tmp_path / "train_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [(line["step"], line["loss"]) for line in jump.history_of(tmp_path)] == [(0, 9.0), (50, 5.5), (100, 4.5)]


@installed
def test_another_run_is_not_gone_on_with(model, tmp_path, data):
    jump.main(**options(tmp_path, data))
    with pytest.raises(ValueError, match=r"seed: got 1, but .*settings.json is of 0"):
        jump.main(**options(tmp_path, data, seed=1))
    arrays = dict(np.load(data))
    np.savez(data, **arrays | {"tokens": arrays["tokens"][::-1]})
    with pytest.raises(ValueError, match=r"text: got .*, but .*settings.json is of"):
        jump.main(**options(tmp_path, data))


@installed
@pytest.mark.parametrize(
    "name, value",
    [
        ("predictor", "x"), ("adaptation", "x"), ("cycle_lengths", "2,a"), ("cycle_lengths", "0"), ("limit", 0),
        ("max_new_tokens", 0), ("steps", -1), ("batch_size", 0), ("max_length", 0), ("seed", -1),
    ],
)  # fmt: skip
def test_a_bad_option_is_named_before_training(model, tmp_path, data, name, value):
    with pytest.raises(ValueError, match=rf"^{name}: got '?{value}"):
        jump.main(**options(tmp_path, data, **{name: value}))
    assert not (tmp_path / "jump").exists()


@installed
def test_its_tokens_are_the_models_own(model):
    import economize

    drafting = economize.apply(model, economize.JumpConfig(**jump.layers(6)))
    ids = torch.tensor([[4, 5, 6, 5]])
    found = drafting.decode(ids[0], 12, decoding=economize.DecodeConfig(cycle_length=3), stop=None).tokens.tolist()
    expected = hf_alone(model, ids, torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=None)[0]
    assert found == expected


@installed
def test_targets_are_the_answers(data):
    dataset = jump.load_dataset(data)
    example = jump.examples(dataset, [0], 16)[0]
    assert example.loss_mask.tolist() == [0] * 3 + [1] * 13 and len(example.input_ids) == 16


def test_layers_are_at_the_authors_share_of_the_depth():
    assert jump.layers(24) == {"target_layer": 16, "source_layer": 17, "exit_layer": 17}
    assert jump.layers(30) == {"target_layer": 20, "source_layer": 21, "exit_layer": 21}
