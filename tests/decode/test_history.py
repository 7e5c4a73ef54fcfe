"""Processors see the right history: a node's own path, or each emitted token once and in order."""

import functools
import random

import firp
import pytest
import torch
from models import EOS, hf_alone, new_tokens, ragged_batch, random_tree, tiny_model, tiny_predictor
from transformers import LogitsProcessor, LogitsProcessorList, SynthIDTextWatermarkingConfig, WatermarkingConfig

NEW_TOKENS = 24
GREEDY = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
PROCESSORS = {
    "repetition_penalty": {"repetition_penalty": 1.5},
    "no_repeat_ngram": {"no_repeat_ngram_size": 2},
    "bad_words": {"bad_words_ids": [[5], [4, 6], [6, 4, 9]]},
    "sequence_bias": {"sequence_bias": {(7, 8): 4.0, (9,): -2.0}},
    "frequency": {"logits_processor": [firp.FrequencyPenalty(0.6, presence=0.3)]},
    "suppress": {"suppress_tokens": [5, 7], "begin_suppress_tokens": [4, 6, 8, 9]},
    "forced_eos": {"forced_eos_token_id": 5, "suppress_tokens": [3]},
    "min_new_tokens": {"min_new_tokens": 19, "eos_token_id": [3, 4, 6]},
    "length_penalty": {"exponential_decay_length_penalty": (4, 1.4)},
    "together": {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "bad_words_ids": [[4, 4]], "min_new_tokens": 9},
}


@functools.cache
def unprocessed(seed):
    """A model, prompts with their mask, and what Hugging Face decodes without any processor."""
    model = tiny_model(seed, vocab=11)
    ids, mask = ragged_batch(random.Random(seed), 4, 11)
    return model, ids, mask, hf_alone(model, ids, mask, **GREEDY)


@pytest.mark.parametrize("options", PROCESSORS.values(), ids=PROCESSORS)
def test_a_nodes_history_is_its_own_path(options):
    accepted = changed = 0
    stops = options.get("eos_token_id", [EOS])
    for seed in range(4):
        model, ids, mask, plain = unprocessed(seed)
        expected = hf_alone(model, ids, mask, **GREEDY, **options)
        changed += expected != plain
        out = firp.generate(
            model, ids, attention_mask=mask, predictor=tiny_predictor(model, seed, "identity"),
            tree=firp.TreeConfig(16, 4),
            return_dict_in_generate=True, **GREEDY, **options,
        )  # fmt: skip
        assert new_tokens(out.sequences, ids.shape[1], stops) == expected
        accepted += out.stats.tokens - out.stats.steps
    assert accepted > 20 and changed >= 2


def test_a_frequency_penalty_counts_occurrences():
    scores = torch.zeros(2, 5)
    ids = torch.tensor([[1, 1, 4, 1], [0, 2, 9, 0]])
    expected = torch.tensor([[0.0, -6.5, 0.0, 0.0, -2.5], [-4.5, 0.0, -2.5, 0.0, 0.0]])
    assert torch.equal(firp.FrequencyPenalty(2.0, presence=0.5)(ids, scores), expected)
    assert not scores.any()


class Counting(LogitsProcessor):
    """Holds state: forbids what was emitted twice in a row, counts its calls, keeps every history it was shown."""

    def __init__(self):
        self.seen = []
        self.banned: dict[int, set[int]] = {}

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids.tolist())
        for b, row in enumerate(input_ids.tolist()):
            if len(row) > 1 and row[-1] == row[-2]:
                self.banned.setdefault(b, set()).add(row[-1])
            scores[b, sorted(self.banned.get(b, ()))] = -float("inf")
        return scores


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("seed", range(6))
def test_a_stateful_processor_sees_every_token_once_and_in_order(seed, batch):
    rng = random.Random(seed)
    model = tiny_model(seed, vocab=7)
    ids, mask = ragged_batch(rng, batch, 7)
    theirs, ours = Counting(), Counting()
    expected = model.generate(ids, attention_mask=mask, logits_processor=LogitsProcessorList([theirs]), **GREEDY)
    out = firp.generate(
        model, ids, attention_mask=mask, predictor=tiny_predictor(model, seed), tree=random_tree(rng),
        logits_processor=LogitsProcessorList([ours]), return_dict_in_generate=True, **GREEDY,
    )  # fmt: skip
    assert torch.equal(out.sequences, expected)
    assert ours.seen == theirs.seen


def test_drafts_are_accepted_under_a_stateful_processor():
    model = tiny_model(1, vocab=7)
    out = firp.generate(
        model, torch.tensor([[4, 5, 6]]), predictor=tiny_predictor(model, 1), tree=firp.TreeConfig(16, 4),
        logits_processor=[Counting()], max_new_tokens=60, do_sample=False, return_dict_in_generate=True,
    )  # fmt: skip
    assert out.stats.tau > 1.1


def test_sampling_with_a_stateful_processor_equals_plain_sampling():
    for seed in range(6):
        model = tiny_model(seed)
        options = {"max_new_tokens": 20, "do_sample": True, "top_k": 0, "seed": seed}
        ids = torch.tensor([[4, 5, 6]])
        plain = firp.generate(model, ids, logits_processor=[Counting()], **options)
        drafted = firp.generate(
            model,
            ids,
            predictor=tiny_predictor(model, seed),
            tree=firp.TreeConfig(8, 3),
            logits_processor=[Counting()],
            **options,
        )
        assert torch.equal(plain, drafted)


def grammar(_, tokens):
    """A token may be followed by its neighbours only."""
    last = int(tokens[-1])
    return [(last + step) % 7 for step in (1, 2, 6)]


GENERAL = {
    "grammar": {"prefix_allowed_tokens_fn": grammar},
    "watermark": {"watermarking_config": WatermarkingConfig(bias=4.0, context_width=1)},
    "synthid": {"watermarking_config": SynthIDTextWatermarkingConfig(keys=[3, 5, 7], ngram_len=3)},
    "guidance": {"guidance_scale": 1.7},
    "negative prompt": {"guidance_scale": 1.7, "negative_prompt_ids": torch.tensor([[6, 4]])},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 2.0},
    "encoder_no_repeat_ngram": {"encoder_no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("options", GENERAL.values(), ids=GENERAL)
def test_processors_of_every_other_kind_equal_hugging_faces(options):
    for seed in range(3):
        model = tiny_model(seed)
        ids = torch.tensor([[4, 5, 6, 5]])
        expected = model.generate(ids, **GREEDY, **options)
        out = firp.generate(
            model, ids, predictor=tiny_predictor(model, seed), tree=firp.TreeConfig(8, 3), **GREEDY, **options
        )
        assert torch.equal(out, expected), seed


def test_right_padding_gives_processors_what_left_padding_would():
    model = tiny_model(3, vocab=11)
    ids, mask = ragged_batch(random.Random(3), 3, 11)
    order = (1 - mask).argsort(dim=1, stable=True)
    options = {"repetition_penalty": 1.5, **GREEDY}
    left, right = Counting(), Counting()
    a = firp.generate(model, ids, attention_mask=mask, logits_processor=[left], **options)
    b = firp.generate(
        model, ids.gather(1, order), attention_mask=mask.gather(1, order), logits_processor=[right], **options
    )
    assert torch.equal(a[:, ids.shape[1] :], b[:, ids.shape[1] :]) and left.seen == right.seen
