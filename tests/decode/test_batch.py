"""One helper answers a batch of prompts: padding, the end, and any number of stop ids."""

import firp
import pytest
import torch
from firp.generation.batch import answer, cut_after_stop, left_padded, stop_ids
from models import tiny_model, tiny_predictor

PROMPTS = [[4, 5, 6], [9], [10, 4, 4, 8, 7]]


@pytest.mark.parametrize("stops", [None, 3, [3], [3, 6], [4, 6, 9]])
def test_answers_are_those_of_each_prompt_alone(stops):
    """A list of stop ids, as Llama 3 has it, works as one id does."""
    model = tiny_model(1, vocab=11)
    model.generation_config.eos_token_id = stops
    engine = firp.Engine(model, tiny_predictor(model, 1), firp.TreeConfig(8, 3))
    expected = set() if stops is None else {stops} if isinstance(stops, int) else set(stops)
    assert stop_ids(model) == expected
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    alone = [model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist() for prompt in PROMPTS]
    assert answer(engine, PROMPTS, **options) == alone


def test_rows_are_cut_after_their_first_stop():
    assert cut_after_stop([[5, 3, 4], [5, 5], [3]], {3}) == [[5, 3], [5, 5], [3]]
    assert cut_after_stop([[5, 3, 4]], set()) == [[5, 3, 4]]


def test_padding_is_on_the_left_and_masked():
    batch = left_padded(PROMPTS, pad_token=2)
    assert batch["input_ids"].tolist() == [[2, 2, 4, 5, 6], [2, 2, 2, 2, 9], [10, 4, 4, 8, 7]]
    assert batch["attention_mask"].sum(1).tolist() == [3, 1, 5]
