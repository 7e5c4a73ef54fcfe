"""Sampling: the same tokens as plain sampling for the same seed, for any drafts and any other sequences beside it."""

import firp
import pytest
import torch
from firp.sampling.choosers import uniforms
from models import PREDICTORS, tiny_model, tiny_predictor
from scipy.stats import kstest
from test_distribution import CHAINS, SHAPES

IDS = torch.tensor([[4, 5, 6, 4], [6, 6, 5, 4]])


@pytest.mark.parametrize("seed", range(len(SHAPES)))
def test_sampled_firp_equals_sampled_plain_decoding(seed):
    """float32, every shape of tree, every chain of processors, every kind of predictor."""
    model = tiny_model(seed, dtype=torch.float32)
    options = {"max_new_tokens": 16, "do_sample": True, "seed": seed}
    accepted = 0
    for i, chain in enumerate(CHAINS):
        predictor = tiny_predictor(model, seed, PREDICTORS[(seed + i) % len(PREDICTORS)], num_offsets=3)
        plain = firp.generate(model, IDS, **options, **chain)
        out = firp.generate(
            model, IDS, predictor=predictor, tree=SHAPES[seed], return_dict_in_generate=True, **options, **chain
        )
        assert torch.equal(plain, out.sequences), chain
        accepted += out.stats.tokens - out.stats.steps
    assert accepted > 0 or SHAPES[seed].kind == "static"


def test_a_sequences_tokens_depend_on_its_index_not_on_its_neighbours():
    model = tiny_model(3)
    options = {"max_new_tokens": 16, "do_sample": True, "seed": 9, "top_k": 0}
    both = firp.generate(model, IDS, predictor=tiny_predictor(model, 3), tree=firp.TreeConfig(8, 3), **options)
    alone = firp.generate(model, IDS[:1], **options)
    shorter = min(both.shape[1], alone.shape[1])
    assert torch.equal(both[:1, :shorter], alone[:, :shorter])
    assert not torch.equal(firp.generate(model, IDS[:1], **{**options, "seed": 10}), alone)


def test_without_a_seed_torchs_own_decides():
    model = tiny_model(3)
    options = {"max_new_tokens": 16, "do_sample": True, "top_k": 0}
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(firp.generate(model, IDS[:1], **options).tolist())
    assert outputs[0] == outputs[1] != outputs[2]


def test_no_token_left_to_draw_is_an_error():
    model = tiny_model(3)
    for draft in ({}, {"predictor": tiny_predictor(model, 3)}):
        with pytest.raises(FloatingPointError) as caught:
            firp.generate(model, IDS[:1], max_new_tokens=3, do_sample=True, suppress_tokens=list(range(7)), **draft)
        assert (
            str(caught.value)
            == "model: its scores after 4 tokens of sequence 0 are NaN, or the processors leave no token"
        )


@pytest.mark.parametrize("varied", ["seed", "sequence", "position"])
def test_uniforms_are_uniform_in_each_of_their_keys(varied):
    many = torch.arange(20_000)
    seeds, sequences, positions = (
        (many if name == varied else torch.full_like(many, 3)) for name in ("seed", "sequence", "position")
    )
    drawn = uniforms(seeds, sequences, positions[:, None])[:, 0]
    assert drawn.min() >= 0 and drawn.max() < 1
    assert kstest(drawn.double().numpy(), "uniform").pvalue > 1e-3
    assert abs(float(torch.corrcoef(torch.stack([drawn[1:], drawn[:-1]]))[0, 1])) < 0.03
