"""The decoder inside a peft model: adapters that live in the layers run as they are, the others are refused by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel

from firp.decoder.originals import ORIGINALS, Homes, library_base, methods_of

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

# Adapters whose layers were tested against peft's own generate (tests/decode/test_adapters.py).
TESTED_TYPES = frozenset(
    ["ADALORA", "BOFT", "C3A", "DELORA", "FOURIERFT", "GRALORA", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR", "LORA",
     "MISS",
     "OFT", "OSF", "RANDLORA", "ROAD", "SHIRA", "TRAINABLE_TOKENS", "VBLORA", "VERA", "WAVEFT"]
)  # fmt: skip
# Arguments of one call that peft hands to its layers through hooks of its own.
PER_CALL = {
    "adapter_names": "one adapter for each row of a batch",
    "alora_offsets": "the place of an invocation",
    "task_ids": "one task for each row of a batch",
}


def check_per_call(options: dict) -> None:
    """Raise ValueError for an argument that peft would hand to its layers during one call."""
    for name, meaning in PER_CALL.items():
        if options.get(name) is not None:
            raise ValueError(
                f"{name}: got {type(options[name]).__name__}, expected None: FIRP does not follow {meaning}; decode "
                f"one "
                "adapter at a time (model.set_adapter)"
            )


def without_peft(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The decoder inside a peft model, whose layers hold the adapters; other models as they are.

    Raises:
        ValueError: adapters of a type that was not tested, or a peft model that was hooked or patched.
    """
    if not hasattr(model, "get_base_model"):
        return model
    for config in _active_configs(model):
        kind = getattr(config.peft_type, "value", str(config.peft_type))
        if getattr(config, "is_prompt_learning", False):
            raise ValueError(
                f"model: got a peft model of type {kind}, expected adapters inside the layers (such as LORA): learned "
                "prompts are no tokens that FIRP could decode over"
            )
        if kind not in TESTED_TYPES:
            raise ValueError(
                f"model: got a peft model of type {kind}, expected one of {', '.join(sorted(TESTED_TYPES))}"
            )
        if getattr(config, "alora_invocation_tokens", None):
            raise ValueError(
                "model: got a peft model with alora_invocation_tokens, expected none: peft switches such an adapter "
                "on in the "
                "middle of a call"
            )
    wrappers = [model] if model.get_base_model() is getattr(model, "base_model", None) else [model, model.base_model]
    for wrapper in wrappers:
        _check_wrapper(wrapper)
    fault = ORIGINALS.fault(Homes.of({type(wrapper) for wrapper in wrappers}))
    if fault is not None:
        raise ValueError(f"model: {fault} is not the one that its library defines, expected the original")
    return model.get_base_model()


def _active_configs(model: PeftModel) -> list[PeftConfig]:
    active = model.active_adapters
    names = active() if callable(active) else active
    return [model.peft_config[name] for name in names if name in model.peft_config]


def _check_wrapper(wrapper: nn.Module) -> None:
    base, overridden = library_base(type(wrapper))
    if base is None or overridden is not None:
        raise ValueError(
            f"model: got {type(wrapper).__name__}, which overrides {overridden}; expected peft's own class"
        )
    if wrapper._forward_hooks or wrapper._forward_pre_hooks:
        raise ValueError(
            f"model: {type(wrapper).__name__} has a forward hook, expected none: FIRP runs the decoder inside it"
        )
    own = sorted(methods_of(type(wrapper)) & vars(wrapper).keys())  # type: ignore[arg-type]
    if own:
        raise ValueError(
            f"model: {type(wrapper).__name__} has its own {own[0]} (a patch), expected peft's: FIRP runs the decoder "
            f"inside it"
        )
