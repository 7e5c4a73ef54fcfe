"""The first invariant: for any tree, predictor and batch, the output is the model's own greedy output."""

import random

import firp
import pytest
import torch
from models import PREDICTORS, hf_alone, new_tokens, ragged_batch, random_tree, tiny_model, tiny_predictor

NEW_TOKENS = 18


def check(model, seed, kind, runs, vocab):
    """`runs` random trees and batches on one model; each batch's rows are compared with single runs."""
    rng = random.Random(seed)
    accepted = 0
    for run in range(runs):
        num_offsets = rng.randint(1, 4)
        predictor = tiny_predictor(model, seed * 100 + run, kind, num_offsets, rng.randint(1, 3))
        ids, mask = ragged_batch(rng, rng.randint(1, 4), vocab)
        tree = random_tree(rng, num_offsets)
        out = firp.generate(
            model, ids, attention_mask=mask, predictor=predictor, tree=tree, max_new_tokens=NEW_TOKENS,
            do_sample=False, return_dict_in_generate=True,
        )  # fmt: skip
        expected = hf_alone(model, ids, mask, max_new_tokens=NEW_TOKENS, do_sample=False)
        assert new_tokens(out.sequences, ids.shape[1]) == expected, (seed, run, kind, tree)
        assert out.stats.tokens == sum(map(len, expected))
        accepted += out.stats.tokens - out.stats.steps
    return accepted


@pytest.mark.parametrize("seed", range(24))
def test_random_trees_predictors_and_batches(seed):
    model = tiny_model(seed, kv_heads=(1, 2, 4)[seed % 3], tied=bool(seed % 2))
    check(model, seed, PREDICTORS[seed % len(PREDICTORS)], runs=3, vocab=7)


def test_drafts_are_accepted_in_these_tests():
    """With seven tokens random drafts are often right: the tests above do walk deep paths."""
    assert check(tiny_model(1), 1, "random", runs=6, vocab=7) > 50


def test_plain_decoding_is_the_same_path():
    model = tiny_model(3)
    ids, mask = ragged_batch(random.Random(3), 4, 7)
    out = firp.generate(
        model, ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True
    )
    assert new_tokens(out.sequences, ids.shape[1]) == hf_alone(
        model, ids, mask, max_new_tokens=NEW_TOKENS, do_sample=False
    )
    assert out.stats.tau == 1.0


def test_custom_generate_hook():
    model = tiny_model(4)
    ids, mask = ragged_batch(random.Random(4), 1, 7)
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)
    predictor = tiny_predictor(model, 4)
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        custom_generate=firp.decode,
        predictor=predictor,
    )
    assert torch.equal(out, expected)


def test_the_predictors_own_tree_shrinks_with_the_batch():
    model = tiny_model(6)
    predictor = tiny_predictor(model, 6)
    engine = firp.Engine(model, predictor)
    assert engine.drafter(1).config.num_nodes == predictor.num_nodes
    assert engine.drafter(2).config.num_nodes == predictor.num_nodes // 2
    assert engine.drafter(predictor.num_nodes) is None
    ids, mask = ragged_batch(random.Random(6), 8, 7)
    out = firp.generate(model, ids, attention_mask=mask, engine=engine, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert new_tokens(out, ids.shape[1]) == hf_alone(model, ids, mask, max_new_tokens=NEW_TOKENS, do_sample=False)


def test_long_prompts_are_prefilled_in_chunks():
    model = tiny_model(8, "mistral")
    ids = torch.randint(4, 7, (1, 90), generator=torch.Generator().manual_seed(8))
    expected = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
    for chunk in (1, 7, 64):
        out = firp.generate(
            model,
            ids,
            predictor=tiny_predictor(model, 8),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            prefill_chunk_size=chunk,
        )
        assert torch.equal(out, expected)
