"""Every supported field of GenerationConfig, with a case that proves it; writes docs/options.md.

Run `python tests/decode/option_cases.py` after a change here or in `firp.generation.options`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from firp.generation.options import REFUSED, WITHOUT_EFFECT
from transformers import GenerationConfig, WatermarkingConfig

DOCS = Path(__file__).parents[2] / "docs/options.md"
LONG, ONE, PAIR = [[4, 5, 6, 5]], [[4]], [[4, 5, 6], [6, 6, 4]]


@dataclass(frozen=True)
class Case:
    """One call with a supported field set.

    Attributes:
        value: of the field.
        others: further options that the field needs to matter.
        prompt: token ids [B, T]; None passes none.
        compare: what must equal Hugging Face's, and differ from its output without the field: "tokens" (greedy),
            "scores" (the first token's processed scores, sampling), "type" (of the result), or "same" (equal tokens
            though the field changes only how they are computed).
    """

    value: object
    others: dict = field(default_factory=dict)
    prompt: list | None = field(default_factory=lambda: LONG)
    compare: str = "tokens"


def scores(value: object, **others) -> Case:
    return Case(value, {"do_sample": True, **others}, compare="scores")


SUPPORTED = {
    "max_length": Case(7),
    "max_new_tokens": Case(2),
    "min_length": Case(20, {"eos_token_id": [3, 4, 5, 6]}),
    "min_new_tokens": Case(11, {"eos_token_id": [3, 4, 5, 6]}),
    "max_time": Case(0.0),
    "stop_strings": Case(["f"]),
    "do_sample": Case(True, {"top_k": 1, "repetition_penalty": 2.0}, compare="same"),
    "temperature": scores(0.5),
    "top_k": scores(2),
    "top_p": scores(0.6),
    "min_p": scores(0.9),
    "top_h": scores(0.5),
    "typical_p": scores(0.6),
    "epsilon_cutoff": scores(0.1),
    "eta_cutoff": scores(0.3),
    "repetition_penalty": Case(2.0),
    "encoder_repetition_penalty": Case(5.0),
    "no_repeat_ngram_size": Case(1),
    "encoder_no_repeat_ngram_size": Case(1),
    "bad_words_ids": Case([[4], [5], [6]]),
    "renormalize_logits": scores(True, top_k=3),
    "forced_bos_token_id": Case(2, prompt=ONE),
    "forced_eos_token_id": Case(2),
    "remove_invalid_values": Case(True, {"logits": "nan"}),
    "exponential_decay_length_penalty": Case((1, 3.0)),
    "suppress_tokens": Case([4, 5, 6]),
    "begin_suppress_tokens": Case([4, 5, 6]),
    "sequence_bias": Case({(4,): -20.0, (5,): -20.0, (6,): -20.0}),
    "guidance_scale": Case(3.0),
    "watermarking_config": Case(WatermarkingConfig(bias=9.0)),
    "num_return_sequences": Case(3, {"do_sample": True, "top_k": 1}),
    "output_scores": Case(True, {"return_dict_in_generate": True}, compare="type"),
    "output_logits": Case(True, {"return_dict_in_generate": True}, compare="type"),
    "return_dict_in_generate": Case(True, compare="type"),
    "pad_token_id": Case(2, {"eos_token_id": [4, 5]}, prompt=PAIR),
    "bos_token_id": Case(5, {"eos_token_id": None}, prompt=None),
    "eos_token_id": Case([4, 5, 6]),
    "prefill_chunk_size": Case(2, compare="same"),
}

# Values that Hugging Face accepts, for fields that change nothing here or there.
HARMLESS = {
    "early_stopping": True,
    "length_penalty": 2.0,
    "decoder_start_token_id": 4,
    "num_assistant_tokens": 7,
    "num_assistant_tokens_schedule": "heuristic",
    "assistant_confidence_threshold": 0.2,
    "max_matching_ngram_size": 3,
    "assistant_lookbehind": 4,
    "target_lookbehind": 4,
    "assistant_ensemble_weight": 0.4,
    "disable_compile": True,
    "transformers_version": "5.0.0",
    "_from_model_config": False,
}

# A value of every refused field.
UNSUPPORTED = {
    "num_beams": 2,
    "num_beam_groups": 2,
    "diversity_penalty": 0.5,
    "constraints": ["a constraint"],
    "force_words_ids": [[4]],
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "low_memory": True,
    "use_mtp": True,
    "prompt_lookup_num_tokens": 3,
    "assistant_early_exit": 2,
    "is_assistant": True,
    "use_cache": False,
    "cache_implementation": "quantized",
    "cache_config": {"backend": "quanto"},
    "max_cache_len": 64,
    "compile_config": {"mode": "default"},
    "token_healing": True,
    "output_attentions": True,
    "output_hidden_states": True,
    "continuous_batching_config": {"num_blocks": 4},
    "speculation_type": "dflash",
}

HOW = {
    "tokens": "greedy tokens equal Hugging Face's, and differ from those without it",
    "scores": "processed scores equal Hugging Face's, and differ from those without it; drawn from exactly",
    "type": "the result holds what Hugging Face's holds",
    "same": "output equals Hugging Face's",
}


def markdown() -> str:
    """The options table."""
    lines = [
        "# Options",
        "",
        "Every field of `GenerationConfig`, as the tests walk them (written by `tests/decode/option_cases.py`). Nothing is",
        "ignored. A field is supported, or it is refused by name, or it has no meaning here and changes nothing in Hugging",
        "Face's own sampling either. A field that a later transformers adds is refused as soon as it is set.",
        "",
        "## Supported",
        "",
        "| Field | Tested with | How |",
        "|---|---|---|",
    ]
    for name, case in SUPPORTED.items():
        value = type(case.value).__name__ if isinstance(case.value, WatermarkingConfig) else repr(case.value)
        lines.append(f"| `{name}` | `{value}` | {HOW[case.compare]} |")
    lines += [
        "",
        "Also supported: `logits_processor`, `stopping_criteria`, `prefix_allowed_tokens_fn`, `negative_prompt_ids`,",
        "`streamer`, `tokenizer` (for stop strings).",
        "",
        "FIRP adds the processor `firp.FrequencyPenalty(frequency, presence)` and the arguments `predictor`, `tree`, `engine`,",
        "`seed` and `on_step`. It also adds `acceptance=firp.TypicalAcceptance(epsilon, delta)`, which is **lossy**: it keeps",
        "drafts that the model finds probable enough though it did not draw them. The output then no longer follows the",
        "model's own distribution.",
        "",
        "## Without effect",
        "",
        "They belong to beams, assistants, encoders or compilation, and change nothing for one sequence at a time.",
        "",
        ", ".join(f"`{name}`" for name in sorted(WITHOUT_EFFECT)) + ".",
        "",
        "## Refused",
        "",
        "| Field | Accepted values | Instead |",
        "|---|---|---|",
    ]
    for name, (values, instead) in REFUSED.items():
        lines.append(f"| `{name}` | {', '.join(f'`{value!r}`' for value in values)} | {instead} |")
    lines += [
        "",
        "Also refused by name: `assistant_model`, `assistant_tokenizer`, `custom_generate`, `synced_gpus`, a filled",
        "`past_key_values`, `inputs_embeds`, your own `position_ids`, a streamer with a batch, `torch.autocast`.",
    ]
    return "\n".join(lines) + "\n"


def fields() -> set[str]:
    """Names of all fields of the installed GenerationConfig, without one that older releases keep for themselves."""
    return set(vars(GenerationConfig())) - {"_commit_hash"}


def prompt_of(case: Case) -> torch.Tensor | None:
    return None if case.prompt is None else torch.tensor(case.prompt)


if __name__ == "__main__":
    DOCS.write_text(markdown())
