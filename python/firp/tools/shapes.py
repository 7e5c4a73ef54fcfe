"""Configurations of well-known models, for what is computed from shapes alone."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

# name -> (repository on the Hub whose config.json has these numbers, model type, its fields)
SHAPES: dict[str, tuple[str, str, dict[str, Any]]] = {}


def _add(name: str, source: str, kind: str, theta: float, **fields: Any) -> None:
    rope = {"rope_type": "default", "rope_theta": theta}
    SHAPES[name] = (source, kind, {**fields, "rope_parameters": rope, "tie_word_embeddings": False})


_LLAMA2 = {"vocab_size": 32000, "max_position_embeddings": 4096}
_add(
    "llama2-7b", "meta-llama/Llama-2-7b-hf", "llama", 1e4, **_LLAMA2, hidden_size=4096, intermediate_size=11008,
    num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32,
)  # fmt: skip
_add(
    "llama2-13b", "meta-llama/Llama-2-13b-hf", "llama", 1e4, **_LLAMA2, hidden_size=5120, intermediate_size=13824,
    num_hidden_layers=40, num_attention_heads=40, num_key_value_heads=40,
)  # fmt: skip
_add(
    "llama2-70b", "meta-llama/Llama-2-70b-hf", "llama", 1e4, **_LLAMA2, hidden_size=8192, intermediate_size=28672,
    num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
)  # fmt: skip
_LLAMA3 = {"vocab_size": 128256, "max_position_embeddings": 131072, "num_key_value_heads": 8}
_add(
    "llama3.1-8b", "meta-llama/Llama-3.1-8B", "llama", 5e5, **_LLAMA3, hidden_size=4096, intermediate_size=14336,
    num_hidden_layers=32, num_attention_heads=32,
)  # fmt: skip
_add(
    "llama3.1-70b", "meta-llama/Llama-3.1-70B", "llama", 5e5, **_LLAMA3, hidden_size=8192, intermediate_size=28672,
    num_hidden_layers=80, num_attention_heads=64,
)  # fmt: skip
_add(
    "mistral-7b", "mistralai/Mistral-7B-v0.3", "mistral", 1e6, vocab_size=32768, max_position_embeddings=32768,
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    sliding_window=None,
)  # fmt: skip
_QWEN2 = {"vocab_size": 152064, "max_position_embeddings": 32768, "use_sliding_window": False}
_add(
    "qwen2.5-7b", "Qwen/Qwen2.5-7B-Instruct", "qwen2", 1e6, **_QWEN2, hidden_size=3584, intermediate_size=18944,
    num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
)  # fmt: skip
_add(
    "qwen2.5-72b", "Qwen/Qwen2.5-72B-Instruct", "qwen2", 1e6, **_QWEN2, hidden_size=8192, intermediate_size=29568,
    num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
)  # fmt: skip
_QWEN3 = {"vocab_size": 151936, "max_position_embeddings": 40960, "head_dim": 128, "use_sliding_window": False}
_add(
    "qwen3-8b", "Qwen/Qwen3-8B", "qwen3", 1e6, **_QWEN3, hidden_size=4096, intermediate_size=12288,
    num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
)  # fmt: skip
_add(
    "qwen3-32b", "Qwen/Qwen3-32B", "qwen3", 1e6, **_QWEN3, hidden_size=5120, intermediate_size=25600,
    num_hidden_layers=64, num_attention_heads=64, num_key_value_heads=8,
)  # fmt: skip
_add(
    "qwen3-30b-a3b", "Qwen/Qwen3-30B-A3B", "qwen3_moe", 1e6, **_QWEN3, hidden_size=2048, intermediate_size=6144,
    num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, num_experts=128, num_experts_per_tok=8,
    moe_intermediate_size=768, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
)  # fmt: skip


def named_config(name: str) -> PreTrainedConfig:
    """The configuration of a named shape, a key of `SHAPES`. Rotary embeddings are the plain ones: no size depends on
    them."""
    _, kind, fields = SHAPES[name]
    return AutoConfig.for_model(kind, **fields)
