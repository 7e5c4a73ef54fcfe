"""Decoding in few rows: no step has more than 10, and the answers are those of plain decoding."""

import firp
import pytest
import torch
from models import tiny_model, tiny_predictor

from benchmarks import few_rows

# Texts that repeat themselves, so that branches are found.
PROMPTS = [torch.tensor(ids) for ids in ([1, 2, 3, 1, 2, 3, 1, 2], [4, 9, 6], [7, 7, 7, 7])]


@pytest.fixture
def model():
    return tiny_model(1, vocab=11)


def test_no_step_has_more_than_ten_rows(model):
    engine = few_rows.engine_with_branches(model, tiny_predictor(model, 1))
    rows, plain = few_rows.rows_of_steps(engine), firp.Engine(model)
    answers = [few_rows.generate(plain, prompt, 24).sequences[0] for prompt in PROMPTS]
    found = few_rows.decoded(engine, rows, PROMPTS, answers, 24)
    assert found["equal"] == found["answers"] == 3
    assert found["steps"] == len(rows)
    # 3 nodes and 2 * 2 pseudo rows; more are those of a branch.
    assert max(rows) == 10
    assert found["tau"] == found["tokens"] / found["steps"] > 1


def test_an_answer_that_differs_is_not_equal(model):
    engine = few_rows.engine_with_branches(model, tiny_predictor(model, 1))
    found = few_rows.decoded(engine, few_rows.rows_of_steps(engine), PROMPTS[:1], [torch.tensor([1, 2])], 8)
    assert found["equal"] == 0


def test_parts_add_up():
    part = {"answers": 2, "equal": 1, "steps": 4, "tokens": 6, "tau": 1.5, "rows": {"mean": 7.0, "most": 8}}
    other = {"answers": 1, "equal": 1, "steps": 1, "tokens": 4, "tau": 4.0, "rows": {"mean": 10.0, "most": 10}}
    expected = {"answers": 3, "equal": 2, "steps": 5, "tokens": 10, "tau": 2.0, "rows": {"most": 10}}
    assert few_rows.together([part, other]) == expected
