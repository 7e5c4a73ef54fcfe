"""Branches of earlier text in the draft tree: what the host expects of them, and that none changes a token."""

import random

import firp
import pytest
import torch
from firp.drafting.choices import Rung
from firp.drafting.lookup import LEAST_MATCH, MOST_BRANCH, MOST_MATCH, Lookup, Text
from firp.engine.costs import Curves
from models import EOS, PREDICTORS, hf_alone, new_tokens, ragged_runs, tiny_model, tiny_predictor
from profiles import engine_with

import firp_kernels

RUNGS = (Rung(firp.TreeConfig(1, 1), 1.0, 1.0), Rung(firp.TreeConfig(4, 2), 1.3, 1.8))
ROOT = (torch.tensor([[-1]]).int(), torch.tensor([[0]]).int(), torch.tensor([[[1]]]).int())


def branch(tokens: list[int]) -> list[int]:
    """What `firp::lookup_branch` adds to the root of a text."""
    history, last, none = torch.tensor([tokens]), torch.tensor([len(tokens) - 1]).int(), torch.tensor([0])
    args = history, last, torch.tensor([[-1]]), none, history[:, -1:], *ROOT, MOST_BRANCH, LEAST_MATCH, MOST_MATCH
    grown = firp_kernels.lookup_branch(*args)
    return [token for token, parent in zip(*(part[0].tolist() for part in grown[:2]), strict=True) if parent >= 0]


@pytest.mark.parametrize("vocab", [2, 3, 9])
def test_the_host_expects_what_the_op_drafts(vocab):
    rng = random.Random(vocab)
    tokens = [rng.randrange(vocab) for _ in range(rng.randint(1, 20))]
    text = Text(tokens)
    for _ in range(60):
        assert branch(text.tokens)[:1] == ([] if text.match is None else [text.expected])
        text.append(rng.randrange(vocab))
    assert Text(text.tokens).match == text.match


def test_a_branch_pays_by_its_chances():
    lookup = Lookup([[5, 6, 7, 8, 9, 1, 5, 6, 7], [1, 2, 3, 4]])
    chances = lookup.chances(0)
    assert len(chances) == MOST_BRANCH and chances == sorted(chances, reverse=True) and not lookup.chances(1)
    price = (chances[2] + chances[3]) / 2
    prices = [price * nodes for nodes in range(1, MOST_BRANCH + 1)]
    assert lookup.pays([0], prices) == 3
    assert lookup.pays([0, 0], prices) == 3
    assert lookup.pays([0, 1], [1e-9] * MOST_BRANCH) == 0  # the batch lasts as long as the sequence without a match
    assert lookup.pays([1], [0.0] * MOST_BRANCH) == 0 and lookup.pays([0], []) == 0
    assert lookup.pays([0], [0.0, 9.0]) == 1


def test_what_held_is_expected_again_and_what_failed_is_not():
    held, failed = (Lookup([[i % 4 for i in range(12)]]) for _ in range(2))
    before = held.chances(0)
    held.observe(0, [i % 4 for i in range(12, 40)])
    assert held.chances(0)[-1] > before[-1]
    for _ in range(40):
        expected = failed.texts[0].expected
        failed.observe(0, [4 if expected is None else (expected + 1) % 5])
    failed.texts[0] = Text([i % 4 for i in range(12)])
    assert failed.chances(0)[-1] < before[-1] / 2


@pytest.fixture
def engine_of(tmp_path, monkeypatch):
    """Makes an engine that adds branches of 0 to 8 nodes in turn."""
    monkeypatch.setenv("FIRP_CACHE", str(tmp_path / "cache"))
    turns = iter(range(1 << 20))
    monkeypatch.setattr(Lookup, "pays", lambda *_: next(turns) * 5 % (MOST_BRANCH + 1))
    return lambda model, predictor, k=3: engine_with(tmp_path, model, predictor, k, RUNGS)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("kind", PREDICTORS)
def test_greedy_tokens_are_hugging_faces(engine_of, kind, k):
    model = tiny_model(3, dtype=torch.float32)
    assert len(list(ragged_runs(engine_of(model, tiny_predictor(model, 3, kind), k), 40))) == 3


def test_sampled_tokens_are_those_of_plain_decoding(engine_of):
    model = tiny_model(4, dtype=torch.float32)
    engine, plain = engine_of(model, tiny_predictor(model, 4)), firp.Engine(model)
    for others in ({}, {"repetition_penalty": 1.2}, {"top_p": 0.8, "temperature": 0.5}):
        options = {"max_new_tokens": 60, "do_sample": True, "seed": 5, "top_k": 0, **others}
        ids = torch.tensor([[4, 5, 6, 4, 5]])
        expected = firp.generate(model, ids, engine=plain, **options)
        assert torch.equal(firp.generate(model, ids, engine=engine, **options), expected)


def test_a_run_ends_at_every_token_of_a_branch(engine_of):
    model = tiny_model(3, dtype=torch.float32)
    engine = engine_of(model, tiny_predictor(model, 3))
    ids = torch.tensor([[4, 5, 6, 4, 5, 6, 4, 5]])
    whole = hf_alone(model, ids, torch.ones_like(ids), max_new_tokens=40, do_sample=False, eos_token_id=None)[0]
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    depths = len(firp.generate(model, ids, engine=engine, **options).stats.emitted_at_least)
    assert depths > 3, "a branch is deeper than the predictor's offsets"
    for length in range(1, 40):
        out = firp.generate(model, ids, engine=engine, max_new_tokens=length, do_sample=False, eos_token_id=None)
        assert out[0, 8:].tolist() == whole[:length]
    for stop in set(whole):
        out = firp.generate(model, ids, engine=engine, max_new_tokens=40, do_sample=False, eos_token_id=stop)
        assert out[0, 8:].tolist() == whole[: whole.index(stop) + 1]


def test_scores_are_those_of_plain_decoding(engine_of):
    model = tiny_model(5, dtype=torch.float64)
    engine, plain = engine_of(model, tiny_predictor(model, 5)), firp.Engine(model)
    ids = torch.tensor([[4, 5, 6, 4, 5]])
    options = {"max_new_tokens": 30, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    out, exact = (firp.generate(model, ids, engine=e, eos_token_id=None, **options) for e in (engine, plain))
    assert torch.equal(out.sequences, exact.sequences) and len(out.scores) == 30
    for row, expected in zip(out.scores, exact.scores, strict=True):
        torch.testing.assert_close(row, expected, rtol=1e-9, atol=1e-9)


def test_every_plain_step_is_counted_and_drafts_are_tried_again(tmp_path, monkeypatch):
    """Also after accepted branches, which cost nothing here."""
    monkeypatch.setenv("FIRP_CACHE", str(tmp_path / "cache"))
    model, free = tiny_model(3, dtype=torch.float32), (0.0,) * MOST_BRANCH
    rungs = Rung(firp.TreeConfig(1, 1), 1.0, 1.0, free), Rung(firp.TreeConfig(4, 2), 1.3, 1.05, free)
    engine = engine_with(tmp_path, model, tiny_predictor(model, 3), 3, rungs)
    options = {"max_new_tokens": 200, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    out = firp.generate(model, torch.tensor([[4, 5, 6, 4, 5, 6, 4, 5]]), engine=engine, **options)
    assert out.stats.tau > 3 and out.rungs[rungs[0]] == out.stats.steps - 1, "the first step verifies no rung's tree"


@pytest.mark.parametrize("num_nodes", [249, 256])
def test_the_largest_trees_have_what_room_is_left(tmp_path, monkeypatch, num_nodes):
    monkeypatch.setenv("FIRP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Lookup, "pays", lambda *_: MOST_BRANCH)
    model = tiny_model(3, vocab=60, dtype=torch.float32)
    rungs = RUNGS[0], Rung(firp.TreeConfig(num_nodes, 2), 1.0, 9.0)
    engine = engine_with(tmp_path, model, tiny_predictor(model, 3, "identity"), 3, rungs)
    ids = torch.tensor([[4, 5, 6, 4, 5, 6, 4, 5]])
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = hf_alone(model, ids, torch.ones_like(ids), **options)
    assert new_tokens(firp.generate(model, ids, engine=engine, **options), 8) == expected
    assert len(Curves((1, 2), (1.0, 1.0), (1.0, 1.0)).branch(rungs[1].tree, 3, 0.5)) == 256 - num_nodes


def test_explicit_trees_plain_runs_and_engines_without_figures_look_nothing_up(tmp_path, monkeypatch):
    monkeypatch.setenv("FIRP_CACHE", str(tmp_path / "cache"))
    model = tiny_model(3)
    predictor = tiny_predictor(model, 3)
    assert not firp.Engine(model, predictor, tree=firp.TreeConfig(4, 2)).looks_up and not firp.Engine(model).looks_up
    engine = engine_with(tmp_path, model, predictor, 2, RUNGS)
    assert engine.looks_up and engine.start([torch.tensor([4, 5])], 5, [EOS], plain=True).history is None
