"""Which fields of a `GenerationConfig` are supported, which are refused, and what to use instead.

Every field stands in exactly one table; a field that none of them knows is refused as soon as it is set, so that
nothing is ever ignored.
"""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedModel

SUPPORTED = frozenset(
    [
        "max_length",
        "max_new_tokens",
        "min_length",
        "min_new_tokens",
        "max_time",
        "stop_strings",
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "top_h",
        "typical_p",
        "epsilon_cutoff",
        "eta_cutoff",
        "repetition_penalty",
        "encoder_repetition_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "bad_words_ids",
        "renormalize_logits",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "remove_invalid_values",
        "exponential_decay_length_penalty",
        "suppress_tokens",
        "begin_suppress_tokens",
        "sequence_bias",
        "guidance_scale",
        "watermarking_config",
        "num_return_sequences",
        "output_scores",
        "output_logits",
        "return_dict_in_generate",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "prefill_chunk_size",
    ]
)

# Fields without meaning for decoding one token after another with a decoder-only model in this engine.
WITHOUT_EFFECT = frozenset(
    [
        "early_stopping",
        "length_penalty",
        "decoder_start_token_id",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "assistant_confidence_threshold",
        "max_matching_ngram_size",
        "assistant_lookbehind",
        "target_lookbehind",
        "assistant_ensemble_weight",
        "disable_compile",
        "transformers_version",
        "_from_model_config",
    ]
)

# Of the class: a folder of `firp export` puts its own `generate` on the object.
_PLAIN = "call type(model).generate without custom_generate"
_BEAMS = f"FIRP follows one sequence at a time; {_PLAIN} for beams"
_DRAFTER = f"FIRP is the drafter here; {_PLAIN} for another one"
_CACHE = "FIRP decodes over a static cache of its own"

# field -> (values that change nothing, what to do instead)
REFUSED: dict[str, tuple[tuple, str]] = {
    "num_beams": ((None, 1), _BEAMS),
    "num_beam_groups": ((None, 1), _BEAMS),
    "diversity_penalty": ((None, 0.0), _BEAMS),
    "constraints": ((None,), _BEAMS),
    "force_words_ids": ((None,), _BEAMS),
    "penalty_alpha": ((None, 0.0), f"contrastive search is not supported; {_PLAIN}"),
    "dola_layers": ((None,), f"DoLa is not supported; {_PLAIN}"),
    "low_memory": ((None, False), "it belongs to contrastive search, which is not supported"),
    "use_mtp": ((None, False), _DRAFTER),
    "speculation_type": ((None,), _DRAFTER),
    "continuous_batching_config": ((None,), "call model.generate_batch for continuous batching"),
    "prompt_lookup_num_tokens": ((None,), _DRAFTER),
    "assistant_early_exit": ((None,), _DRAFTER),
    "is_assistant": ((None, False), "a FIRP model cannot be the assistant of another"),
    "use_cache": ((None, True), _CACHE),
    "cache_implementation": ((None, "dynamic", "static"), _CACHE),
    "cache_config": ((None,), _CACHE),
    "max_cache_len": ((None,), _CACHE),
    "compile_config": ((None,), "the engine decides how its layers are compiled"),
    "token_healing": ((None, False), "heal the prompt before generating"),
    "output_attentions": ((None, False), "attention weights are never materialised; use model(...) on the result"),
    "output_hidden_states": ((None, False), "hidden states are not kept; use model(..., output_hidden_states=True)"),
}


def first_given(name: str, model: PreTrainedModel, options: dict) -> object:
    """Value of an option of `generate`: an argument before the configuration passed, that before the model's own."""
    config = options.get("generation_config")
    holders = (options, {} if config is None else vars(config), vars(model.generation_config))
    return next((fields[name] for fields in holders if fields.get(name) is not None), None)


def check_options(fields: Mapping[str, object]) -> None:
    """Raise ValueError, naming the field and the alternative, for an option that is not supported.

    Args:
        fields: names and values of a `GenerationConfig`.
    """
    for name, value in fields.items():
        if name in SUPPORTED or name in WITHOUT_EFFECT:
            continue
        if name not in REFUSED:
            if value is None or name.startswith("_"):
                continue
            raise ValueError(f"{name}: got {value!r}, an option that FIRP does not know and so does not ignore")
        harmless, instead = REFUSED[name]
        if not any(value is allowed or value == allowed for allowed in harmless):
            expected = " or ".join(repr(allowed) for allowed in harmless)
            raise ValueError(f"{name}: got {value!r}, expected {expected}: {instead}")
