"""Tiny random models, predictors and trees for tests of the engine."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import firp
import torch
from firp.generation.output import FirpOutput
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

EOS, PAD = 3, 0
SLIDING = {"sliding_window": 6}
MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2, **SLIDING}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}


def _rope(rope_type: str, **others) -> dict:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 1e4, **others}}


# name -> (model type, what differs from the others)
FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("llama", _rope("linear", factor=2.0)),
    "llama-llama3": (
        "llama",
        _rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
    ),
    "llama-yarn": ("llama", _rope("yarn", factor=4.0, original_max_position_embeddings=64)),
    "llama-dynamic": ("llama", {**_rope("dynamic", factor=4.0), "max_position_embeddings": 16}),
    "llama-longrope": (
        "llama",
        _rope(
            "longrope", long_factor=[4.0] * 4, short_factor=[1.0] * 4, original_max_position_embeddings=16, factor=4.0
        ),
    ),
    "mistral": ("mistral", SLIDING),
    "qwen2": ("qwen2", {}),
    "qwen2-sliding": ("qwen2", {**MIXED, "use_sliding_window": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3-sliding": ("qwen3", {**MIXED, "use_sliding_window": True, "head_dim": 16}),
    "apertus": ("apertus", {}),
    "arcee": ("arcee", {}),
    "cohere": ("cohere", {"logit_scale": 0.5}),
    "cohere2": ("cohere2", {"logit_scale": 0.5, **MIXED}),
    "cwm": ("cwm", MIXED),
    "ernie4_5": ("ernie4_5", {}),
    "exaone4": ("exaone4", MIXED),
    "gemma": ("gemma", {"head_dim": 8}),
    "glm": ("glm", {"head_dim": 8}),
    "glm4": ("glm4", {"head_dim": 8}),
    "granite": ("granite", {"embedding_multiplier": 2.0, "logits_scaling": 3.0, "residual_multiplier": 0.5}),
    "helium": ("helium", {"head_dim": 8}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {"head_dim": 8}),
    "ministral": ("ministral", {"head_dim": 8, **MIXED}),
    "mixtral": ("mixtral", {**EXPERTS, "num_local_experts": 4, **SLIDING}),
    "olmo": ("olmo", {"clip_qkv": 2.0}),
    "olmo2": ("olmo2", {}),
    "olmoe": ("olmoe", {**EXPERTS, "num_experts": 4}),
    "phi3": ("phi3", {**SLIDING, **_rope("default", partial_rotary_factor=0.5)}),
    "phi3-longrope": (
        "phi3",
        {**_rope("longrope", long_factor=[4.0] * 4, short_factor=[1.0] * 4), "original_max_position_embeddings": 64},
    ),
    "qwen2_moe": ("qwen2_moe", {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16}),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "num_experts": 4, "head_dim": 16}),
    "seed_oss": ("seed_oss", {"head_dim": 8}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1, 1]}),
    "starcoder2": ("starcoder2", SLIDING),
}
PREDICTORS = ("random", "zero", "identity", "inverted", "nan", "inf", "huge")


def tiny_model(
    seed: int,
    family: str = "llama",
    vocab: int = 7,
    kv_heads: int = 2,
    tied: bool = False,
    dtype=torch.float64,
    **sizes,
) -> PreTrainedModel:
    """A random decoder whose greedy output varies: 4 layers of width 32, weights three times the usual size."""
    model_type, extra = FAMILIES[family]
    torch.manual_seed(seed)
    settings = {
        "vocab_size": vocab,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 256,
        "eos_token_id": EOS,
        "bos_token_id": 1,
        "pad_token_id": PAD,
        "tie_word_embeddings": tied,
    }
    config = AutoConfig.for_model(model_type, **{**settings, **extra, **sizes})
    # The default way of running experts knows no float64.
    experts = {"experts_implementation": "eager"} if EXPERTS.items() <= extra.items() else {}
    model = AutoModelForCausalLM.from_config(config, **experts).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model


def tiny_predictor(model: PreTrainedModel, seed: int, kind: str = "random", num_offsets: int = 3, layer: int = 2):
    """A predictor of any kind, useful or hostile; all but "identity" have a token transition."""
    rank = 0 if kind == "identity" else 5
    predictor = firp.FirpPredictor.for_model(model, num_offsets, layer, transition_rank=rank).to(model.dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        weight, transition = predictor.weight, predictor.transition
        if kind == "random":
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.3)
            transition.copy_(torch.randn(transition.shape, generator=generator) * 0.05)
        elif kind == "inverted":
            weight.neg_()
            transition[0], transition[1] = 0.3, -0.3
        elif kind in ("zero", "nan", "inf", "huge"):
            for parameter in (weight, transition):
                parameter.fill_({"zero": 0.0, "nan": float("nan"), "inf": float("inf"), "huge": 1e30}[kind])
    return predictor


def update_predictor(
    model: PreTrainedModel, seed: int, kind: str = "random", num_offsets: int = 3, layer: int = 2, listed: int = 0
):
    """A predictor that updates final states, useful or hostile; it drafts `listed` tokens, or all."""
    sizes = {"transition_rank": 5, "update_width": 9, "draft_vocabulary": listed}
    predictor = firp.FirpPredictor.for_model(model, num_offsets, layer, **sizes).to(model.dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in predictor.named_parameters():
            if kind == "random":
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
            elif name != "weight":
                parameter.fill_({"zero": 0.0, "nan": float("nan"), "inf": float("inf"), "huge": 1e30}[kind])
        if listed:
            predictor.draft_tokens.copy_(
                torch.randperm(model.config.vocab_size, generator=generator)[:listed].sort()[0]
            )
    return predictor


def random_tree(rng: random.Random, num_offsets: int = 3) -> firp.TreeConfig:
    """A random size and kind; static trees have random prefix-closed rank paths half of the time."""
    num_nodes = rng.choice((1, 2, 3, 5, 8, 13, 33))
    kind = rng.choice(("dynamic", "static"))
    paths = None
    if kind == "static" and rng.random() < 0.5:
        chosen = {()}
        num_nodes = min(num_nodes, 1 + sum(7**depth for depth in range(1, num_offsets + 1)))
        while len(chosen) < num_nodes:
            parent = rng.choice([path for path in sorted(chosen) if len(path) < num_offsets])
            chosen.add(parent + (rng.randrange(7),))
        paths = tuple(sorted(chosen - {()}))
    return firp.TreeConfig(num_nodes, rng.randint(1, num_nodes), kind, paths)


def ragged_batch(rng: random.Random, batch: int, vocab: int, longest: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded prompts [B, T] and their attention mask; the last prompt is unpadded."""
    lengths = [rng.randint(1, longest) for _ in range(batch - 1)] + [longest]
    ids = torch.full((batch, longest), PAD)
    mask = torch.zeros_like(ids)
    for b, length in enumerate(lengths):
        ids[b, longest - length :] = torch.tensor([rng.randrange(4, vocab) for _ in range(length)])
        mask[b, longest - length :] = 1
    return ids, mask


def hf_alone(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, **options) -> list[list[int]]:
    """New tokens of Hugging Face's own `generate`, each prompt alone and unpadded."""
    out = []
    for row, keep in zip(ids, mask.bool(), strict=True):
        prompt = row[keep][None]
        out.append(
            model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, prompt.shape[1] :].tolist()
        )
    return out


def new_tokens(sequences: torch.Tensor, prompt_length: int, stops: Sequence[int] = (EOS,)) -> list[list[int]]:
    """New tokens of a batch, cut after the first end-of-sequence token."""
    rows = sequences[:, prompt_length:].tolist()
    return [row[: next((i + 1 for i, token in enumerate(row) if token in stops), len(row))] for row in rows]


def ragged_runs(engine: firp.Engine, max_new_tokens: int) -> Iterator[FirpOutput]:
    """Greedy runs of 1, 2 and 5 ragged prompts of tokens below 7; their tokens are those of Hugging Face alone."""
    options = {"max_new_tokens": max_new_tokens, "do_sample": False}
    for batch in (1, 2, 5):
        ids, mask = ragged_batch(random.Random(batch), batch, 7)
        given = {"attention_mask": mask, "engine": engine, "return_dict_in_generate": True}
        out = firp.generate(engine.model, ids, **given, **options)
        assert new_tokens(out.sequences, ids.shape[1]) == hf_alone(engine.model, ids, mask, **options)
        yield out
