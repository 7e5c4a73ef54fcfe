"""Random configurations in float64: greedy output is Hugging Face's, sampled output is plain decoding's."""

import random

import firp
import pytest
import torch
from models import (
    EOS,
    FAMILIES,
    PREDICTORS,
    hf_alone,
    new_tokens,
    ragged_batch,
    random_tree,
    tiny_model,
    tiny_predictor,
)

GROUPS, PER_GROUP, EXHAUSTIVE_PER_GROUP = 10, 6, 100
VOCAB, NEW_TOKENS = 11, 12


def random_processors(rng: random.Random) -> dict:
    """Options whose effect does not depend on padding, so that a batch equals single runs."""
    suppressed = rng.randrange(VOCAB)
    choices = {
        "repetition_penalty": rng.choice((0.7, 1.3, 2.0)),
        "no_repeat_ngram_size": rng.choice((2, 3)),
        "bad_words_ids": [[rng.randrange(4, VOCAB)], [rng.randrange(4, VOCAB), rng.randrange(4, VOCAB)]],
        "sequence_bias": {(rng.randrange(4, VOCAB),): 2.0, (rng.randrange(4, VOCAB), rng.randrange(VOCAB)): -3.0},
        "min_new_tokens": rng.randint(1, NEW_TOKENS),
        "suppress_tokens": [suppressed],
        "begin_suppress_tokens": [rng.randrange(VOCAB)],
        "exponential_decay_length_penalty": (rng.randint(1, 6), 1.2),
        "forced_eos_token_id": (suppressed + rng.randrange(1, VOCAB)) % VOCAB,
        "eos_token_id": sorted({3, rng.randrange(VOCAB)}),
        "logits_processor": [firp.FrequencyPenalty(rng.choice((-0.2, 0.7)), rng.choice((0.0, 0.4)))],
        "renormalize_logits": True,
        "remove_invalid_values": True,
    }
    return {name: choices[name] for name in rng.sample(sorted(choices), rng.choice((0, 1, 1, 2, 3)))}


def random_sampling(rng: random.Random) -> dict:
    choices = {
        "temperature": rng.choice((0.3, 0.8, 1.5)), "top_p": rng.choice((0.5, 0.9)), "min_p": 0.05, "typical_p": 0.8,
        "epsilon_cutoff": 0.01, "eta_cutoff": 0.02,
    }  # fmt: skip
    return {
        "do_sample": True, "top_k": rng.choice((0, 3)), "seed": rng.randrange(2**40),
        "num_return_sequences": rng.choice((1, 1, 3)),
        **{name: choices[name] for name in rng.sample(sorted(choices), rng.randint(0, 3))},
    }  # fmt: skip


def right_padded(ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    order = (1 - mask).argsort(dim=1, stable=True)
    return ids.gather(1, order), mask.gather(1, order)


def run_one(seed: int) -> int:
    """One random configuration; returns how many tokens came free."""
    rng = random.Random(seed)
    family = rng.choice(sorted(FAMILIES))
    # A dynamic RoPE of Hugging Face's remembers the longest sequence it ever saw.
    model = tiny_model(rng.randrange(40), family, VOCAB, rng.choice((1, 2, 4)), rng.random() < 0.3)
    num_offsets = rng.randint(1, 4)
    predictor = tiny_predictor(model, seed, rng.choice(PREDICTORS), num_offsets, rng.randint(1, 3))
    tree = random_tree(rng, num_offsets) if rng.random() < 0.8 else None
    ids, mask = ragged_batch(rng, rng.randint(1, 4), VOCAB, rng.choice((2, 6, 12)))
    given = right_padded(ids, mask) if rng.random() < 0.3 else (ids, mask)
    options = {"max_new_tokens": NEW_TOKENS, **random_processors(rng)}
    common = {"attention_mask": given[1], **options, "return_dict_in_generate": True}
    if rng.random() < 0.5:
        out = firp.generate(model, given[0], predictor=predictor, tree=tree, do_sample=False, **common)
        expected = hf_alone(model, ids, mask, do_sample=False, **options)
        found = new_tokens(out.sequences, ids.shape[1], options.get("eos_token_id", [EOS]))
        assert found == expected, (seed, family, tree, options)
    else:
        common |= random_sampling(rng)
        out = firp.generate(model, given[0], predictor=predictor, tree=tree, **common)
        plain = firp.generate(model, given[0], **common)
        assert torch.equal(out.sequences, plain.sequences), (seed, family, tree, options)
        assert plain.stats.tau == 1.0
        assert new_tokens(out.sequences, ids.shape[1])
    return out.stats.tokens - out.stats.steps


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("group", range(GROUPS))
def test_random_configurations(group, pytestconfig):
    count = EXHAUSTIVE_PER_GROUP if pytestconfig.getoption("exhaustive") else PER_GROUP
    assert sum(run_one(group * EXHAUSTIVE_PER_GROUP + i) for i in range(count)) > 0
