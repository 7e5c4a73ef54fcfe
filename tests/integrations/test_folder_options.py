"""What no table of options holds, by a folder in both forms: the same as `firp.generate`, or refused by the same name."""

import firp
import pytest
import torch
from models import tiny_model, tiny_predictor
from transformers import DynamicCache, GenerationConfig
from transformers.generation.streamers import BaseStreamer

IDS, PAIR = torch.tensor([[4, 5, 6, 7]]), torch.tensor([[4, 5], [6, 7]])
GREEDY = {"max_new_tokens": 12, "do_sample": False}
TREE = firp.TreeConfig(8, 3)


class Seen(BaseStreamer):
    """Tokens, or steps, as they come."""

    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens += value.reshape(-1).tolist()

    def end(self):
        self.tokens.append("end")

    def __call__(self, event):
        self.tokens.append((event.step, event.tokens, event.ended))


CASES = {
    "streamer": lambda: {**GREEDY, "streamer": Seen()},
    "on_step": lambda: {**GREEDY, "on_step": Seen()},
    "seed": lambda: {"do_sample": True, "max_new_tokens": 12, "seed": 3},
    "acceptance": lambda: {"do_sample": True, "max_new_tokens": 12, "seed": 3, "acceptance": firp.TypicalAcceptance(0.5, 0.9)},
    "logits_processor": lambda: {**GREEDY, "logits_processor": [firp.FrequencyPenalty(0.6, 0.3)]},
    "stopping_criteria": lambda: {**GREEDY, "stopping_criteria": [lambda ids, scores: ids.shape[1] >= 8]},
    "prefix_allowed_tokens_fn": lambda: {**GREEDY, "prefix_allowed_tokens_fn": lambda *_: [3, 5, 8, 9]},
    "negative_prompt_ids": lambda: {**GREEDY, "guidance_scale": 2.5, "negative_prompt_ids": torch.tensor([[0, 8, 9]]), "negative_prompt_attention_mask": torch.tensor([[0, 1, 1]])},
    "generation_config": lambda: {"generation_config": GenerationConfig(**GREEDY, repetition_penalty=1.7, eos_token_id=3, pad_token_id=0)},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_what_is_passed_has_the_effect_it_has_in_firp_generate(name, folder_forms):
    model = tiny_model(1, vocab=11)
    given = CASES[name]()
    expected = firp.generate(model, IDS, predictor=tiny_predictor(model, 1), tree=TREE, **given)
    for generate in folder_forms(model, 11):
        own = CASES[name]()
        assert torch.equal(generate(IDS, tree=TREE, **own), expected)
        if isinstance(given.get(name), Seen):
            assert own[name].tokens == given[name].tokens and len(own[name].tokens) > 3


def filled():
    cache = DynamicCache(config=tiny_model(1, vocab=11).config)
    tiny_model(1, vocab=11)(IDS, past_key_values=cache)
    return cache


REFUSED = {
    "assistant_model": lambda: {"inputs": IDS, "assistant_model": tiny_model(1, vocab=11)},
    "assistant_tokenizer": lambda: {"inputs": IDS, "assistant_tokenizer": "x"},
    "synced_gpus": lambda: {"inputs": IDS, "synced_gpus": True},
    "past_key_values": lambda: {"inputs": torch.cat([IDS, IDS], 1), "past_key_values": filled()},
    "inputs_embeds": lambda: {"inputs_embeds": torch.zeros(1, 4, 32)},
    "position_ids": lambda: {"inputs": IDS, "position_ids": torch.tensor([[3, 4, 5, 6]])},
    "streamer": lambda: {"inputs": PAIR, "streamer": Seen()},
    "seed": lambda: {"inputs": IDS, "seed": "x"},
    "on_step": lambda: {"inputs": IDS, "on_step": 3},
    "acceptance": lambda: {"inputs": IDS, "acceptance": "typical"},
    "input_ids": lambda: {"inputs": torch.tensor([[4, 99]])},
    "telepathy": lambda: {"inputs": IDS, "telepathy": 1},
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_by_the_same_sentence(name, folder_forms):
    model = tiny_model(1, vocab=11)
    forms = [lambda **given: firp.generate(model, **given), *folder_forms(model, 11)]
    said = []
    for generate in forms:
        with pytest.raises((ValueError, TypeError)) as caught:
            generate(**REFUSED[name](), **GREEDY)
        said.append(str(caught.value))
    assert name in said[0] and said == said[:1] * 3


def test_autocast_is_refused(folder_forms):
    model = tiny_model(1, vocab=11)
    for generate in folder_forms(model, 11):
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="autocast"):
            generate(IDS, **GREEDY)
