"""Hugging Face `generate` with a static cache and torch.compile: the strongest plain decoding that library has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._triton import has_triton
from transformers import CompileConfig, PreTrainedModel, StaticCache

CACHE_STEP = 256
WARMUP_TOKENS = 4


def check_compilable(model: PreTrainedModel) -> None:
    """Raise ValueError, naming what is missing, unless torch.compile works for the model here."""
    reason = None
    if not getattr(model, "_can_compile_fullgraph", False):
        reason = f"{type(model).__name__} does not say that it compiles as one graph"
    elif not torch._dynamo.is_dynamo_supported():
        reason = "torch.compile does not support this Python or platform"
    elif model.device.type == "cuda" and not has_triton():
        reason = "Triton is not installed, which torch.compile needs on a GPU: pip install triton"
    elif model.device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except (InvalidCxxCompiler, RuntimeError):
            reason = "no C++ compiler, which torch.compile needs on a CPU: apt install g++"
    if reason is not None:
        raise ValueError(f"methods: 'hf-compiled' cannot run here: {reason}")


class CompiledGenerate:
    """`model.generate` over one static cache, its one-token forward compiled.

    The cache grows in steps when a prompt needs it, and every new size is compiled and warmed up at once, in `prepare`,
    which is not timed.

    Args:
        model: a Hugging Face causal decoder that compiles as one graph.

    Raises:
        ValueError: it does not, or a compiler is missing.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        check_compilable(model)
        self.model = model
        self.cache: Any = None  # Made by `prepare`.
        self.capacity = 0
        # Each cache size gets a graph of its own; one graph for all of them would be slower.
        self.config = CompileConfig(dynamic=False)
        # Hugging Face compiles on accelerators alone unless asked otherwise.
        self.config._compile_all_devices = True

    def prepare(self, ids: Tensor, max_new_tokens: int) -> None:
        """Make room for ids [1, T] and the new tokens, and compile what that changes."""
        needed = ids.shape[1] + max_new_tokens
        if needed <= self.capacity:
            return
        self.capacity = -(-needed // CACHE_STEP) * CACHE_STEP
        self.cache = StaticCache(config=self.model.config, max_cache_len=self.capacity)
        # The first call compiles, the second captures graphs where there are any.
        for _ in range(2):
            self(ids, min(WARMUP_TOKENS, max_new_tokens))

    def __call__(self, ids: Tensor, max_new_tokens: int) -> Tensor:
        """Greedy continuation of ids [1, T], prompt included, as `generate` returns it."""
        self.cache.reset()
        return self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False,
            past_key_values=self.cache, compile_config=self.config,
        )  # fmt: skip
