"""A prompt's pass beside the model's own: both are timed over the same tokens, in turns."""

import json

import firp
import pytest
import torch
from models import tiny_model

from benchmarks import prompts
from benchmarks.commands import run


def test_both_pass_the_same_tokens_in_turns(tmp_path, monkeypatch):
    model, seen = tiny_model(1, vocab=31, dtype=torch.float32), []
    monkeypatch.setattr("firp.load_model", lambda *_: (model, None))
    for name in ("pass_of_engine", "pass_of_model"):
        own = getattr(prompts, name)

        def noted(which, tokens, own=own, name=name):
            seen.append((name, tokens.tolist()))
            return own(which, tokens)

        monkeypatch.setattr(prompts, name, noted)
    prompts.main(tmp_path / "prompts.json", "tiny", "5,9", "float32", repeats=2, seed=0, device="cpu")
    turns = ["pass_of_engine", "pass_of_model"] * 2 + ["pass_of_model", "pass_of_engine"]
    assert [name for name, _ in seen] == turns * 2
    assert {len(tokens) for _, tokens in seen[:6]} == {6} and all(tokens == seen[0][1] for _, tokens in seen[:6])
    parts = json.loads((tmp_path / "prompts.json").read_text())["parts"]
    assert list(parts) == ["float32, 5 tokens", "float32, 9 tokens"]
    found = parts["float32, 9 tokens"]["figures"]
    assert found["engine"] > 0 and found["hugging face"] > 0 and len(found["ratios"]) == 2


@pytest.mark.parametrize("lengths", ["", "5,", "5,x", "0", "-3", "\u00b2"])
def test_lengths_are_positive(lengths, tmp_path):
    with pytest.raises(ValueError, match=r"lengths: got .*, expected positive numbers"):
        prompts.main(tmp_path / "prompts.json", lengths=lengths, dtypes="float32", repeats=1)


def test_what_cannot_be_timed_is_named_first(tmp_path, monkeypatch):
    model = tiny_model(1, vocab=31, dtype=torch.float32)
    monkeypatch.setattr("firp.load_model", lambda *_: (model, None))
    for lengths in ("1000000000000", "99999999999999999999"):
        with pytest.raises(ValueError, match="expected at most"):
            prompts.main(tmp_path / "prompts.json", "tiny", lengths, "float32", repeats=1, seed=0, device="cpu")
    with pytest.raises(ValueError, match="dtypes: got 'foo', expected float32, bfloat16"):
        prompts.main(tmp_path / "prompts.json", "tiny", "5", "float32,foo", repeats=1, seed=0, device="cpu")


def test_all_tokens_but_the_last_pass(monkeypatch):
    model = tiny_model(1, vocab=31, dtype=torch.float32)
    assert prompts.pass_of_engine(firp.Engine(model), torch.arange(7)) >= 0
    lengths = []
    monkeypatch.setattr(type(model), "forward", lambda self, ids, **_: lengths.append(ids.shape))
    prompts.pass_of_model(model, torch.arange(7))
    assert lengths == [(1, 6)]


def test_a_command_that_is_stopped_says_how_to_go_on(monkeypatch, capsys):
    def stopped() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.argv", ["command"])
    with pytest.raises(SystemExit) as end:
        run(stopped)
    assert end.value.code == 130 and "the same command goes on" in capsys.readouterr().err
