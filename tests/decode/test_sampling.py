"""Sampling: the same tokens as plain sampling for the same seed, and the model's own distribution."""

import firp
import torch
from models import tiny_model, tiny_predictor
from scipy.stats import chisquare


def test_sampled_firp_equals_sampled_plain_decoding():
    for seed in range(12):
        model = tiny_model(seed)
        ids = torch.tensor([[4, 5, 6, 4], [6, 6, 5, 4]])
        options = {"max_new_tokens": 16, "do_sample": True, "seed": seed, "temperature": 0.9, "top_k": 0, "top_p": 0.95}
        plain = firp.generate(model, ids, **options)
        drafted = firp.generate(model, ids, predictor=tiny_predictor(model, seed), tree=firp.TreeConfig(8, 3), **options)
        assert torch.equal(plain, drafted), seed


def test_the_distribution_is_the_models_own():
    """Chi-square of the first three sampled tokens over 3,000 seeds against the exact joint distribution."""
    model = tiny_model(2, vocab=7)
    with torch.no_grad():
        model.lm_head.weight.div_(3)
    predictor, prompt = tiny_predictor(model, 2), torch.tensor([[4, 5]])
    engine = firp.Engine(model, predictor, firp.TreeConfig(6, 2))
    stop = [3]
    expected: dict[tuple, float] = {}

    def extend(tokens: tuple, probability: float) -> None:
        if len(tokens) == 3 or (tokens and tokens[-1] in stop):
            expected[tokens] = probability
            return
        ids = torch.cat([prompt, torch.tensor([tokens], dtype=torch.long)], 1)
        with torch.no_grad():
            following = torch.softmax(model(ids).logits[0, -1], -1)
        for token, p in enumerate(following.tolist()):
            extend((*tokens, token), probability * p)

    extend((), 1.0)
    draws = 3000
    counts = dict.fromkeys(expected, 0)
    for seed in range(draws // 100):
        out = firp.generate(model, prompt.repeat(100, 1), engine=engine, seed=seed, max_new_tokens=3, do_sample=True, top_k=0)
        for row in out[:, 2:].tolist():
            cut = row.index(3) + 1 if 3 in row else 3
            counts[tuple(row[:cut])] += 1
    common = [key for key, p in expected.items() if p * draws >= 5]
    observed = [counts[key] for key in common] + [draws - sum(counts[key] for key in common)]
    wanted = [expected[key] * draws for key in common] + [draws * (1 - sum(expected[key] for key in common))]
    if wanted[-1] < 5:
        observed, wanted = observed[:-1], wanted[:-1]
        scale = sum(observed) / sum(wanted)
        wanted = [value * scale for value in wanted]
    assert chisquare(observed, wanted).pvalue > 1e-3
