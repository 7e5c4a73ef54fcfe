"""Edges of a batch and of a vocabulary: who ends when, what fills the rest, which tokens can go on."""

import functools

import firp
import pytest
import torch
from models import tiny_model, tiny_predictor
from torch import nn

GREEDY = {"do_sample": False, "max_new_tokens": 16}
IDS = torch.randint(4, 11, (3, 7), generator=torch.Generator().manual_seed(8))


def drafting(model, seed=1):
    return {"predictor": tiny_predictor(model, seed), "tree": firp.TreeConfig(8, 3)}


def without_end(seed, pad):
    model = tiny_model(seed, vocab=11)
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = None, pad
    return model


def holds(token, count=2):
    """A criterion: the new tokens hold `token` that often."""
    return lambda ids, scores, **_: (ids[:, 7:] == token).sum(1) >= count


@functools.cache
def hf_until(seed, pad, token):
    """A model, and what Hugging Face decodes until a row holds `token`."""
    model = without_end(seed, pad)
    return model, model.generate(IDS, stopping_criteria=[holds(token)], **GREEDY)


@pytest.mark.parametrize("pad", [None, 0])
@pytest.mark.parametrize("general", [False, True], ids=["fast", "sequential"])
def test_rows_without_an_end_token_go_on_until_the_last_has_ended(pad, general):
    """In Hugging Face nothing is padded where no end token is set; a rule that allows every token changes nothing."""
    options = {**GREEDY, **({"prefix_allowed_tokens_fn": lambda *_: list(range(11))} if general else {})}
    lengths = set()
    for seed in range(8):
        for token in (4, 6, 9):
            model, expected = hf_until(seed, pad, token)
            found = firp.generate(model, IDS, stopping_criteria=[holds(token)], **drafting(model), **options)
            assert torch.equal(found, expected)
            lengths.add(expected.shape[1])
    assert len(lengths) > 2


def test_scores_of_such_rows_are_as_long_as_they():
    model = without_end(1, None)
    keep = {"return_dict_in_generate": True, "output_scores": True, "stopping_criteria": [holds(9, 1)], **GREEDY}
    theirs, ours = model.generate(IDS, **keep), firp.generate(model, IDS, **keep, **drafting(model))
    assert torch.equal(ours.sequences, theirs.sequences) and len(ours.scores) == len(theirs.scores)
    for a, b in zip(ours.scores, theirs.scores, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_rows_that_need_padding_without_a_token_for_it_are_refused():
    from transformers import EosTokenCriteria

    model = without_end(1, None)
    with pytest.raises(ValueError, match="pad_token_id: got None, expected a token id"):
        firp.generate(model, IDS, stopping_criteria=[EosTokenCriteria(torch.tensor([9]))], **drafting(model), **GREEDY)


@pytest.mark.parametrize("family", ["mistral", "qwen2-sliding", "cohere2", "phi3"])
def test_holes_in_a_mask_under_a_sliding_window_are_refused(family):
    model = tiny_model(1, family, vocab=11)
    mask = torch.ones(1, 7, dtype=torch.long)
    mask[0, 3] = 0
    with pytest.raises(
        ValueError, match="attention_mask: got 1 masked tokens inside the prompt of row 0, expected none"
    ):
        firp.generate(model, IDS[:1], attention_mask=mask, **drafting(model), **GREEDY)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_outside_a_prompt_under_a_sliding_window_is_left_out(side):
    model = tiny_model(1, "mistral", vocab=11)
    padded = torch.nn.functional.pad(IDS, (3, 0) if side == "left" else (0, 3))
    mask = torch.nn.functional.pad(torch.ones_like(IDS), (3, 0) if side == "left" else (0, 3))
    out = firp.generate(model, padded, attention_mask=mask, **drafting(model), **GREEDY)
    for row, prompt in zip(out, IDS, strict=True):
        expected = model.generate(prompt[None], **GREEDY)[0, 7:]
        assert torch.equal(row[10:][: len(expected)], expected)


def test_holes_without_a_window_in_reach_work():
    for family, options in (("llama", GREEDY), ("mistral", {"do_sample": False, "max_new_tokens": 1})):
        model = tiny_model(1, family, vocab=11, **({"sliding_window": 9} if family == "mistral" else {}))
        mask = torch.ones(1, 7, dtype=torch.long)
        mask[0, 3] = 0
        expected = model.generate(IDS[:1], attention_mask=mask, **options)
        assert torch.equal(firp.generate(model, IDS[:1], attention_mask=mask, **drafting(model), **options), expected)


def with_head(model, rows, factor):
    """Rows past the embeddings are the first ones times `factor`: above 1 they win where scores are positive."""
    old = model.lm_head.weight
    head = nn.Linear(old.shape[1], rows, bias=False).to(old.dtype)
    with torch.no_grad():
        head.weight.copy_(torch.cat([old, old * factor])[:rows])
    model.lm_head = head
    return model


@pytest.mark.parametrize("rows", [8, 11, 14, 22])
@pytest.mark.parametrize("seed", range(3))
def test_a_head_of_another_size_ends_no_run(rows, seed):
    """Drafts past the embeddings are dropped; the model's own choices stay within them here."""
    model = with_head(tiny_model(seed, vocab=11), rows, 0.0)
    expected = model.generate(IDS[:1], **GREEDY)
    assert torch.equal(firp.generate(model, IDS[:1], **drafting(model, seed), **GREEDY), expected)


def test_a_token_without_an_embedding_is_named():
    """Hugging Face fails with an IndexError at the forward after it, if there is one."""
    refused = 0
    for seed in range(6):
        model = with_head(tiny_model(seed, vocab=11, eos_token_id=None), 22, 1.5)
        for count in (1, 16):
            options = {"do_sample": False, "max_new_tokens": count}
            try:
                expected = model.generate(IDS[:1], **options)
            except IndexError:
                refused += 1
                with pytest.raises(ValueError, match=r"model: chose token \d+, which has no embedding, expected 0..10"):
                    firp.generate(model, IDS[:1], **drafting(model, seed), **options)
            else:
                assert torch.equal(firp.generate(model, IDS[:1], **drafting(model, seed), **options), expected)
    assert refused
