"""Acceptance replayed from a recording is that of real decoding, step by step, for any tree."""

import random
from functools import partial

import firp
import pytest
import torch
from firp.decoder.view import DecoderView
from firp.drafting.recording import record
from firp.drafting.transition import token_tables
from firp.generation.batch import greedy_answers
from firp.tune.acceptance import replay
from models import random_tree, tiny_model, tiny_predictor, update_predictor


def setup(seed, family="llama", vocab=7, make=tiny_predictor):
    model = tiny_model(seed, family=family, vocab=vocab)
    predictor = make(model, seed)
    rng = random.Random(seed)
    prompts = [torch.tensor([rng.randrange(4, vocab) for _ in range(rng.randint(1, 9))]) for _ in range(4)]
    return model, predictor, prompts, rng


def recordings_of(model, predictor, prompts, max_new_tokens, num_ranks=40):
    answers = greedy_answers(firp.Engine(model), prompts, max_new_tokens, batch_size=3)
    return [record(DecoderView(model), predictor, p, a, num_ranks) for p, a in zip(prompts, answers, strict=True)]


def replayed(recordings, tree, k, model, predictor):
    return replay(recordings, tree, k, token_tables(DecoderView(model), predictor.transition)).stats


def decoded(model, predictor, prompts, tree, max_new_tokens):
    """Statistics of decoding each prompt alone."""
    engine, stats = firp.Engine(model, predictor, tree), firp.DecodeStats()
    for prompt in prompts:
        out = firp.generate(
            model,
            prompt[None],
            engine=engine,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
        )
        stats.merge(out.stats)
    return stats


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_replay_counts_the_steps_that_decoding_takes(family):
    for seed in range(2):
        model, predictor, prompts, rng = setup(seed, family)
        recordings = recordings_of(model, predictor, prompts, 30)
        for _ in range(3):
            tree, k = random_tree(rng), 3
            expected = decoded(model, predictor, prompts, tree, 30)
            assert replayed(recordings, tree, k, model, predictor) == expected, (seed, tree)


@pytest.mark.parametrize("family", ["llama", "granite"])
def test_replay_counts_the_steps_that_decoding_with_an_update_takes(family):
    for seed in range(2):
        model, predictor, prompts, rng = setup(seed, family, vocab=19, make=update_predictor)
        recordings = recordings_of(model, predictor, prompts, 30, num_ranks=16)
        for _ in range(3):
            tree = random_tree(rng)
            expected = decoded(model, predictor, prompts, tree, 30)
            assert replayed(recordings, tree, 3, model, predictor) == expected, (seed, tree)


@pytest.mark.parametrize("make", [tiny_predictor, update_predictor, partial(update_predictor, listed=5)])
@pytest.mark.parametrize("k", [1, 2])
def test_fewer_offsets_replay_from_the_same_recording(k, make):
    model, predictor, prompts, _ = setup(5, make=make)
    recordings = recordings_of(model, predictor, prompts, 24)
    for tree in (firp.TreeConfig(6, 2), firp.TreeConfig(5, 5, "static"), firp.TreeConfig(12, 1)):
        assert replayed(recordings, tree, k, model, predictor) == decoded(
            model, predictor.first_offsets(k), prompts, tree, 24
        )


def test_a_larger_vocabulary_and_a_limit_of_one_token():
    model, predictor, prompts, _ = setup(6, vocab=50)
    for limit in (1, 17):
        recordings = recordings_of(model, predictor, prompts, limit)
        for tree in (firp.TreeConfig(16, 4), firp.TreeConfig(40, 3, "static")):
            assert replayed(recordings, tree, 3, model, predictor) == decoded(model, predictor, prompts, tree, limit)


def test_plain_decoding_delivers_one_token_a_step():
    model, predictor, prompts, _ = setup(7)
    assert replay(recordings_of(model, predictor, prompts, 12), firp.TreeConfig(1, 1), 3).stats.tau == 1.0


def test_the_pace_of_each_answer():
    model, predictor, prompts, rng = setup(9)
    recordings = recordings_of(model, predictor, prompts, 20)
    for tree in (firp.TreeConfig(1, 1), random_tree(rng)):
        whole = replay(recordings, tree, 3, token_tables(DecoderView(model), predictor.transition))
        lengths = [len(recording.tokens) - 1 for recording in recordings]
        alone = [decoded(model, predictor, [prompt], tree, 20).steps for prompt in prompts]
        assert whole.paces.tolist() == [steps / length for steps, length in zip(alone, lengths, strict=True)]


def test_first_offsets_share_the_weights():
    _, predictor, _, _ = setup(8)
    shorter = predictor.first_offsets(2)
    assert shorter.num_offsets == 2 and shorter.weight.data_ptr() == predictor.weight.data_ptr()
    assert predictor.first_offsets(3) is predictor
    with pytest.raises(ValueError, match="num_offsets: got 4"):
        predictor.first_offsets(4)
