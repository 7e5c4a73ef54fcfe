"""What FIRP makes of every field of vLLM's speculative config. An option without a meaning is refused by name."""

from __future__ import annotations

from typing import Any

# vLLM's scheduler and runner do these, or the plug-in does.
HONOURED = frozenset({
    "model", "method", "revision", "num_speculative_tokens", "num_speculative_tokens_per_batch_size", "max_model_len",
    "disable_padded_drafter_batch", "draft_tensor_parallel_size", "enforce_eager",
})  # fmt: skip

# vLLM fills these in, and the plug-in sets the last.
FILLED_IN = frozenset({
    "target_model_config", "target_parallel_config", "draft_model_config", "draft_parallel_config",
    "disable_eagle_block_drop",
})  # fmt: skip

# They are of other drafters, of a draft model's own weights and kernels, or of another way to draft and verify. The
# values are those of a config that nobody gave the option in; vLLM itself sets 0 in some.
UNUSED: dict[str, tuple[Any, ...]] = {
    "tensor_parallel_size": (None,),
    "quantization": (None,),
    "moe_backend": (None,),
    "attention_backend": (None,),
    "kv_cache_dtype": (None,),
    "code_revision": (None,),
    "draft_load_config": (None,),
    "index_share_for_mtp_iteration": (None,),
    "use_local_argmax_reduction": (False,),
    "use_heterogeneous_vocab": (False,),
    "prompt_lookup_max": (None, 0),
    "prompt_lookup_min": (None, 0),
    "parallel_drafting": (False,),
    "suffix_decoding_max_tree_depth": (24,),
    "suffix_decoding_max_cached_requests": (10000,),
    "suffix_decoding_max_spec_factor": (1.0,),
    "suffix_decoding_min_token_prob": (0.1,),
    "rejection_sample_method": ("standard",),
    "synthetic_acceptance_rates": (None,),
    "synthetic_acceptance_length": (None,),
    "enable_adaptive_verification": (False,),
    "draft_sample_method": ("greedy",),
    "dspark_draft_topk": (None,),
}


def check_options(config: Any) -> None:
    """Raise ValueError for an option of a speculative config that would have no effect, or draft another way.

    Args:
        config: vLLM's SpeculativeConfig, of a FIRP checkpoint.
    """
    if config.method not in (None, "eagle3"):
        refuse("method", config.method, "none, or 'eagle3', which vLLM calls it")
    for name, allowed in UNUSED.items():
        if (value := getattr(config, name)) not in allowed:
            refuse(name, value, repr(allowed[0]))
    for name in ("draft_model_config", "draft_parallel_config"):
        if isinstance(getattr(config, name), (dict, str)):  # not vLLM's own
            refuse(name, getattr(config, name), "None")
    if config.enforce_eager is False:
        refuse("enforce_eager", False, "True or None: the drafts' pass runs outside graphs")
    ranks = config.target_parallel_config.tensor_parallel_size
    if config.draft_tensor_parallel_size not in (None, ranks):
        refuse("draft_tensor_parallel_size", config.draft_tensor_parallel_size, f"{ranks} (the target's layers draft)")


def refuse(name: str, value: object, expected: str) -> None:
    """Raise ValueError that names an option."""
    raise ValueError(f"speculative_config: {name}: got {value!r}, expected {expected} with FIRP")
