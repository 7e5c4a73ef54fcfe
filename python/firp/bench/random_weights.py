"""Models of well-known shapes with random weights: right for the cost of a step, meaningless for its tokens."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from firp.drafting.predictor import FirpPredictor
from firp.tools.hardware import available_memory
from firp.tools.shapes import named_config

# Positions beyond the original limit, so that steps at a context of 4096 fit; they cost nothing.
MAX_POSITIONS = 8192
TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128,
}  # fmt: skip
# name -> that of `firp.tools.shapes`.
SHAPES = {"llama2-7b": "llama2-7b", "llama2-13b": "llama2-13b", "llama3-8b": "llama3.1-8b", "tiny": None}


def shape_config(shape: str) -> LlamaConfig:
    """The configuration of a named shape.

    Raises:
        ValueError: an unknown shape.
    """
    if shape not in SHAPES:
        raise ValueError(f"random_weights: got {shape!r}, expected one of {', '.join(SHAPES)}")
    name = SHAPES[shape]
    config = LlamaConfig(**TINY, tie_word_embeddings=False) if name is None else named_config(name)
    config.max_position_embeddings = MAX_POSITIONS
    return config


def cache_bytes(config: LlamaConfig, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of `tokens` tokens in all layers."""
    width = config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * width * tokens * dtype.itemsize


def build(
    shape: str, dtype: torch.dtype, device: str, num_offsets: int, cached_tokens: int
) -> tuple[LlamaForCausalLM, FirpPredictor]:
    """A model and a predictor with random weights, made directly on the device.

    Args:
        num_offsets: k. The insertion layer is two thirds up, as in the shipped predictor.
        cached_tokens: tokens that caches will hold at once, for the memory check alone.

    Raises:
        ValueError: an unknown shape, or more memory needed than there is, with the numbers.
    """
    config = shape_config(shape)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
        predictor = FirpPredictor.for_model(model, num_offsets, config.num_hidden_layers * 2 // 3).to(dtype)
    weights = sum(p.numel() * p.element_size() for module in (model, predictor) for p in module.parameters())
    needed, available = weights + cache_bytes(config, cached_tokens, dtype), available_memory(device)
    if needed > available:
        raise ValueError(
            f"random_weights: {shape!r} in {str(dtype).removeprefix('torch.')} needs {needed / 1e9:.1f} GB on {device} "
            f"(weights {weights / 1e9:.1f} GB, the rest keys and values), {available / 1e9:.1f} GB are free"
        )
    model.to_empty(device=device)
    with torch.device(device):  # its frequencies are no parameters: made again, and in float32
        model.model.rotary_emb = LlamaRotaryEmbedding(config)
    predictor.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in (*model.parameters(), *predictor.parameters()):
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.02, generator=generator)
    return model.eval(), predictor.eval()
