"""Decoding with branches of earlier text and without them: the same trees and answers, other rows."""

from unittest import mock

import firp
import pytest
import torch
from api_server import write_chat_model
from firp.drafting.choices import Rung
from models import tiny_model, tiny_predictor
from profiles import engine_with

from benchmarks import few_rows
from benchmarks.ablations import lookup

PROMPTS = [torch.tensor(ids) for ids in ([1, 2, 3, 1, 2, 3, 1, 2], [7, 7, 7, 7])]


def test_branches_are_taken_away_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setenv("FIRP_CACHE", str(tmp_path / "cache"))
    model = tiny_model(1, vocab=11)
    rungs = Rung(firp.TreeConfig(1, 1), 1.0, 1.0), Rung(firp.TreeConfig(3, 2), 0.1, 2.0, (0.0,) * 3)
    engine, plain = engine_with(tmp_path, model, tiny_predictor(model, 1), 1, rungs), firp.Engine(model)
    rows = few_rows.rows_of_steps(engine)
    answers = [few_rows.generate(plain, prompt, 24).sequences[0] for prompt in PROMPTS]
    own = few_rows.decoded(engine, rows, PROMPTS, answers, 24)
    with mock.patch("firp.generation.loop.Lookup", lookup.NoBranches):
        without = few_rows.decoded(engine, rows, PROMPTS, answers, 24)
    assert own["equal"] == without["equal"] == 2
    assert without["rows"]["most"] == 3 + 2 < own["rows"]["most"] <= 3 + 2 + 3
    assert own["tau"] > without["tau"]


def test_a_predictor_that_has_no_branches_is_refused(tmp_path):
    named = {"model": str(write_chat_model(tmp_path)), "predictor": str(tmp_path / "predictor")}
    with pytest.raises(ValueError, match="predictor: got one without an acceptance profile"):
        lookup.main(few_rows.OWN_PROMPTS, tmp_path / "lookup.json", limit=1, max_new_tokens=4, **named)
    assert not (tmp_path / "lookup.json").exists()
