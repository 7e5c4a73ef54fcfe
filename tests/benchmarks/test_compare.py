"""Drafters side by side: trees of equal rows, replayed heads, and figures that are kept part by part."""

import json

import firp
import pytest
import torch
from firp.decoder.passes import real_rows
from firp.drafting.recording import make_profile
from firp.tune.acceptance import replay

from benchmarks.baselines import compare
from benchmarks.baselines.recording import record_heads
from benchmarks.document import Document


def test_comparison_at_equal_rows(setup, tmp_path, monkeypatch, capsys):
    made = setup()
    profile = make_profile(
        made.view, made.predictor, [(a.prompt, a.tokens, a.category) for a in made.answers], made.tables
    )
    monkeypatch.setattr(compare, "find_profile", lambda _: "profile")
    monkeypatch.setattr(compare, "load_profile", lambda _: profile)
    for rows in (4, 9, 16):
        tree, k = compare.best_tree(profile, rows)
        assert tree.num_nodes + tree.num_lookahead * k <= rows
        smaller = firp.TreeConfig(2, 1)
        assert profile.tau(tree, k) >= profile.tau(smaller, 1)
    with pytest.raises(ValueError, match="rows: got 2, expected at least 3"):
        compare.best_tree(profile, 2)
    monkeypatch.setattr(compare, "BESIDE", ("ar", "hf"))
    arguments = {
        "heads": tmp_path / "heads", "json_path": tmp_path / "compare.json", "rows": "4,9", "model": "tiny",
        "predictor": "p", "prompts": tmp_path / "prompts.jsonl", "limit": 2, "max_new_tokens": 8, "repeats": 1,
        "dtype": "float32", "device": "cpu",
    }  # fmt: skip
    compare.main(**arguments)
    document = json.loads((tmp_path / "compare.json").read_text())
    assert set(document["parts"]) == {"any", "4", "9"}
    methods = document["parts"]["9"]["figures"]["methods"]
    assert set(methods) == {"ar", "firp", "medusa", "early-exit"} and methods["ar"]["tau"] == 1.0
    assert "early-exit" in capsys.readouterr().out
    for rows, message in (
        ("4,x", "rows: got '4,x', expected positive numbers"),
        ("1", "rows: got 1, expected at least 3"),
    ):
        with pytest.raises(ValueError, match=message):
            compare.main(**{**arguments, "rows": rows})


def test_heads_are_recorded_as_they_draft(setup):
    made = setup()
    answer, heads = made.answers[0], made.heads["early-exit"]
    recording = record_heads(made.view, heads, answer.prompt, answer.tokens, 8)
    hidden = real_rows(made.view, torch.cat([answer.prompt, torch.tensor(answer.tokens)])[None, :-1], 2).inserted[0]
    best = (
        heads.scores(made.view, hidden[len(answer.prompt) - 1 :]).softmax(-1).sort(dim=-1, descending=True, stable=True)
    )
    assert torch.equal(recording.candidates, best.indices[..., :8])
    torch.testing.assert_close(recording.probabilities, best.values[..., :8])
    assert replay([recording], firp.TreeConfig(4, 4), 2).stats.tokens == len(answer.tokens)


def test_a_part_is_computed_again_only_where_its_inputs_changed(tmp_path):
    path, calls = tmp_path / "f.json", []

    def part(made_from, settings=(1,)):
        def compute():
            calls.append(made_from)
            return {"n": len(calls)}

        return Document(path, {"size": settings}, {}).part("a", made_from, compute)["n"]

    assert [part({"w": 1}), part({"w": 1}), part({"w": 2})] == [1, 1, 2]
    with pytest.raises(ValueError, match=r"size: got \[2\], but .*f.json is of \[1\]"):
        part({"w": 2}, (2,))
    path.write_text('{"settings": {"size": [1]}, "parts": {"a": {"made_from": {}}}}')
    with pytest.raises(ValueError, match="part 'a': got no figures; choose another file, or remove it"):
        part({"w": 2})
    path.write_text("{")
    with pytest.raises(ValueError, match=r"f.json: .*, or remove it to begin again"):
        part({"w": 2})
    path.write_text("{}")
    with pytest.raises(ValueError, match="got no settings"):
        part({"w": 2})
