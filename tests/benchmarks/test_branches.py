"""Branches replayed: the steps that decoding takes, with and without one, and the rows that are stated."""

import firp
import pytest
import torch
from api_server import write_chat_model
from firp.drafting.choices import Rung
from firp.drafting.lookup import MOST_BRANCH, Lookup, Text
from models import tiny_model, tiny_predictor
from profiles import engine_with, made_profile, some_prompts

from benchmarks.ablations.branches import BESIDE, FEW_ROWS, TWO, WITHIN, Trees, beside, found, main, replay, second_end

TOKENS = 40


@pytest.fixture(scope="module")
def made():
    model = tiny_model(3, vocab=9, dtype=torch.float64)
    model.generation_config.eos_token_id = None
    predictor, prompts = tiny_predictor(model, 3), some_prompts(0, 9)
    engine = firp.Engine(model)
    rows = [firp.generate(model, p[None], engine=engine, max_new_tokens=TOKENS, do_sample=False)[0] for p in prompts]
    answers = [(p, row[len(p) :].tolist()) for p, row in zip(prompts, rows, strict=True)]
    return model, predictor, answers, made_profile(model, predictor, prompts, TOKENS)


def test_what_is_found_is_what_the_op_would_draft(made):
    _, _, answers, _ = made
    matches, held = found(answers)
    at = 0
    for prompt, answer in answers:
        for place in range(len(answer)):
            text = Text(prompt.tolist() + answer[:place])
            assert matches[at] == (text.match is not None)
            assert bool(held[at, 0]) == (text.expected == answer[place])
            assert held[at, 0] <= held[at, 1]
            at += 1
    assert at == len(held) and held.max() == MOST_BRANCH and not matches.all()


@pytest.mark.parametrize(
    "tokens, expected",
    [
        ([1, 2, 5, 1, 2, 6, 1, 2], 1),  # the latest is followed by 6
        ([1, 2, 5, 1, 2, 6, 1, 2, 6, 1, 2], 1),
        ([3, 1, 2, 5, 1, 2, 6, 3, 1, 2], 5),  # the longest first, then a shorter match with another token
        ([1, 2, 5, 1, 2, 5, 1, 2], None),
        ([1, 2, 3, 4], None),
    ],
)
def test_a_second_occurrence_has_another_next_token(tokens, expected):
    assert second_end(Text(tokens)) == expected


def test_with_two_occurrences_the_better_one_counts():
    _, held = found([(torch.tensor([1, 2, 5, 1, 2, 6, 1, 2]), [5, 1, 2]), (torch.tensor([1, 2, 1, 2]), [1, 2])])
    assert held.tolist()[0] == [0, 3] and held.tolist()[3] == [2, 2]


def test_without_branches_it_is_the_profiles_replay(made):
    matches, held = found(made[2])
    for trees in (beside(4, 2, 3), beside(8, 8, 2), *WITHIN):
        plain = made[3].replay(firp.TreeConfig(*trees.tree), trees.num_offsets)
        assert replay(made[3], trees, matches & False, held).tolist() == plain.tolist()


@pytest.mark.parametrize("nodes, lookahead, k", [(4, 2, 3), (8, 8, 2), (2, 1, 1)])
def test_beside_a_tree_it_counts_the_steps_of_decoding(made, tmp_path, monkeypatch, nodes, lookahead, k):
    monkeypatch.setenv("FIRP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Lookup, "pays", lambda *_: MOST_BRANCH)
    model, predictor, answers, profile = made
    rungs = Rung(firp.TreeConfig(1, 1), 1.0, 1.0), Rung(firp.TreeConfig(nodes, lookahead), 1e-6, 2.0)
    engine = engine_with(tmp_path, model, predictor, k, rungs)
    options = {"engine": engine, "max_new_tokens": TOKENS, "do_sample": False, "return_dict_in_generate": True}
    steps = [firp.generate(model, prompt[None], **options).stats.steps for prompt, _ in answers]
    assert replay(profile, beside(nodes, lookahead, k), *found(answers)).tolist() == steps
    assert sum(steps) < replay(profile, beside(nodes, lookahead, k), found(answers)[0] & False, found(answers)[1]).sum()


def test_rows_are_those_of_a_step():
    assert Trees((4, 3), (2, 1), 6, 2).rows == (10, 10) and beside(4, 2, 2).rows == (8, 16)
    assert all(trees.rows[0] == trees.rows[1] for trees in WITHIN) and max(FEW_ROWS[0].rows) == 10
    assert all(trees.tree == trees.matched for trees in BESIDE)
    assert TWO[0].rows == (4, 20) and TWO[-1].rows == (256, 256)


def test_the_command_keeps_a_part_for_each_file(tmp_path, capsys):
    paths = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    named = {"model": str(write_chat_model(tmp_path)), "predictor": str(tmp_path / "predictor")}
    for path in paths * 2:
        path.write_text('{"prompt": "w1 w2 w3 w1 w2 w3 w1 w2"}\n')
        main(path, tmp_path / "branches.json", limit=1, max_new_tokens=6, **named)
    assert capsys.readouterr().out.count("with branches") == 4 * len([*BESIDE, *WITHIN, *TWO, *FEW_ROWS])
