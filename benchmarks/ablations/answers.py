"""The model's greedy answers to prompts of a file, and tau over them by category."""

from __future__ import annotations

import firp
import numpy as np
import torch
from firp.drafting.profile import AcceptanceProfile
from firp.generation.batch import greedy_answers
from firp.tools.prompt_files import Prompt, encode
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.commands import check_length

# Prompt [T], new tokens, category: what `make_profile` takes.
Answers = list[tuple[Tensor, list[int], str]]


def answers_to(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt], max_new_tokens: int
) -> Answers:
    """Answers to the first turn of each prompt, one at a time.

    Raises:
        ValueError: fewer tokens than one.
    """
    check_length(max_new_tokens)
    texts = [torch.tensor(encode(tokenizer, [{"role": "user", "content": prompt.turns[0]}])) for prompt in prompts]
    found = greedy_answers(firp.Engine(model), texts, max_new_tokens, 1)
    return [(text, answer, prompt.category) for text, answer, prompt in zip(texts, found, prompts, strict=True)]


def tau_by_category(profile: AcceptanceProfile, steps: np.ndarray) -> dict[str, float]:
    """tau of answers that take these steps [S], over all and in each category."""
    parts = {name: profile.category == i for i, name in enumerate(profile.categories)}
    named = {"all": np.ones_like(profile.category, bool), **parts}
    return {name: float(profile.lengths[some].sum() / steps[some].sum()) for name, some in named.items()}
