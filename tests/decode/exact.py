"""The exact distribution of the first sampled tokens, by Hugging Face's own processors, and a test against it."""

from __future__ import annotations

from collections import Counter

import torch
from models import EOS
from scipy.stats import chisquare
from transformers import PreTrainedModel


def captured_processors(model: PreTrainedModel, prompt: torch.Tensor, **options):
    """The processors that Hugging Face makes of `options` for this prompt."""
    found = []

    def capture(model, input_ids, logits_processor=None, **_):
        found.append(logits_processor)
        return input_ids

    model.generate(prompt, custom_generate=capture, **options)
    return found[0]


@torch.no_grad()
def joint_distribution(
    model: PreTrainedModel, prompt: torch.Tensor, length: int, **options
) -> dict[tuple[int, ...], float]:
    """Probability of every sequence of `length` new tokens, shorter where it ends in EOS, after prompt [1, T]."""
    processors = captured_processors(model, prompt, do_sample=True, max_new_tokens=length, **options)
    live, ended = {(): 1.0}, {}
    for _ in range(length):
        paths = list(live)
        ids = torch.cat([prompt.repeat(len(paths), 1), torch.tensor(paths, dtype=torch.long).view(len(paths), -1)], 1)
        following = torch.softmax(processors(ids, model(ids).logits[:, -1].float()), -1).tolist()
        extended = {}
        for path, row in zip(paths, following, strict=True):
            for token, probability in enumerate(row):
                if probability > 0:
                    (ended if token == EOS else extended)[(*path, token)] = live[path] * probability
        live = extended
    return live | ended


def chi_square(counts: Counter, expected: dict[tuple[int, ...], float]) -> float:
    """The p-value of observed counts; outcomes expected fewer than five times are taken together."""
    impossible = set(counts) - set(expected)
    assert not impossible, f"outcomes without probability: {sorted(impossible)[:5]}"
    draws = sum(counts.values())
    observed, wanted = [], []
    rare_observed = rare_wanted = 0.0
    for outcome, probability in expected.items():
        if probability * draws >= 5:
            observed.append(counts[outcome])
            wanted.append(probability * draws)
        else:
            rare_observed += counts[outcome]
            rare_wanted += probability * draws
    if rare_wanted >= 5:
        observed.append(rare_observed)
        wanted.append(rare_wanted)
    scale = sum(observed) / sum(wanted)
    return float(chisquare(observed, [value * scale for value in wanted]).pvalue)
