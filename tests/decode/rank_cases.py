"""What tests of several ranks decode, in one process and in every process of a job."""

from __future__ import annotations

import random
from pathlib import Path

import firp
import torch
from models import EOS, PAD, ragged_batch, tiny_model, tiny_predictor
from transformers import LogitsProcessor, PreTrainedModel, StoppingCriteria

VOCAB, LAYERS = 8, 2
# The larger one holds most paths of three tokens.
TREE, LARGE_TREE = firp.TreeConfig(33, 33), firp.TreeConfig(250, 33)
SMALL_TREE = firp.TreeConfig(6, 2)
# Models whose greedy output varies; 5 for others.
SEEDS = {"llama": 20, "mistral": 0, "qwen2": 53, "qwen3": 4}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# Planned otherwise by transformers: gathered heads, experts, tied or offset norms.
MORE_FAMILIES = (*FAMILIES, "phi3", "mixtral", "gemma", "olmo2", "cohere", "smollm3")


class Alternate(LogitsProcessor):
    """A processor that the package does not know: it raises the token after the last one."""

    def __call__(self, input_ids, scores):
        raised = (input_ids[:, -1:] + 1) % scores.shape[-1]
        return scores.scatter_add(1, raised, torch.full_like(scores[:, :1], 1.5))


class AfterTokens(StoppingCriteria):
    """Ends a sequence of T + n tokens."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids, scores, **_):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


PROMPTS, MASK = ragged_batch(random.Random(4), 4, VOCAB, longest=7)
ONE = {"input_ids": PROMPTS[-1:], "attention_mask": MASK[-1:]}
FOUR = {"input_ids": PROMPTS, "attention_mask": MASK}
SAMPLED = {"do_sample": True, "seed": 11, "temperature": 1.3, "top_p": 0.95}
# In every family.
REQUESTS = {
    "greedy": {**FOUR, "max_new_tokens": 10, "do_sample": False},
    "sampled": {**FOUR, "max_new_tokens": 8, **SAMPLED},
}
# In one family.
OTHER_REQUESTS = {
    "penalties": {
        **FOUR,
        "max_new_tokens": 8,
        "do_sample": False,
        "repetition_penalty": 1.4,
        "no_repeat_ngram_size": 3,
    },
    "own processor": {**FOUR, "max_new_tokens": 6, **SAMPLED, "logits_processor": [Alternate()]},
    "own processor, one prompt": {**ONE, "max_new_tokens": 10, "do_sample": False, "logits_processor": [Alternate()]},
    "criteria": {**FOUR, "max_new_tokens": 10, "do_sample": False, "stopping_criteria": [AfterTokens(12)]},
    "no token ends it": {**ONE, "max_new_tokens": 12, "do_sample": False, "eos_token_id": None},
}
STOPS = {
    **{f"limit {n}": {"max_new_tokens": n} for n in range(1, 7)},
    **{f"token {t}": {"eos_token_id": t, "max_new_tokens": 9} for t in (0, 1, 5, 2, 4)},
    **{f"criterion {n}": {"stopping_criteria": [AfterTokens(7 + n)], "max_new_tokens": 9} for n in (1, 2, 3, 4, 9)},
}


def model_of(family: str, kv_heads: int = 2) -> PreTrainedModel:
    """The whole tiny model of a family; "ties" is a Llama whose tokens 4 and 5, and 6 and 7, always tie."""
    kind = "llama" if family == "ties" else family
    model = tiny_model(SEEDS.get(kind, 5), kind, VOCAB, kv_heads, dtype=torch.float32, num_hidden_layers=LAYERS)
    if family == "ties":
        with torch.no_grad():
            model.lm_head.weight[5::2] = model.lm_head.weight[4::2]
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = EOS, PAD
    return model


def write_models(root: Path, families: tuple[str, ...], kv_heads: int) -> None:
    for family in families:
        model_of(family, kv_heads).save_pretrained(root / family)


def predictor_for(model: PreTrainedModel, seed: int = 1) -> firp.FirpPredictor:
    return tiny_predictor(model, seed, layer=1)


def decoded(engine: firp.Engine, request: dict) -> dict:
    """Tokens of a run, and how many steps delivered more than 1, 2, ... of them."""
    out = firp.generate(engine.model, engine=engine, return_dict_in_generate=True, **request)
    return {"tokens": out.sequences.tolist(), "deep": out.stats.emitted_at_least, "steps": out.stats.steps}
