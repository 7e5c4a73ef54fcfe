"""What a caller hands to `generate`: checked, with one error that names it."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from firp.generation.padding import Prompts

CACHES = ("past_key_values", "cache")  # its names up to transformers 5.23, and from 5.24 on
MODEL_INPUTS = {"attention_mask", "position_ids", *CACHES, "use_cache", "logits_to_keep", "token_type_ids"}


def _given(value: object) -> str:
    return value.__name__ if isinstance(value, type) else type(value).__name__


def check_arguments(model: PreTrainedModel, ids: object, options: dict) -> None:
    """What Hugging Face would meet with an error of its own insides, before it prepares anything."""
    if not hasattr(model, "generation_config"):
        raise ValueError(f"model: got {_given(model)}, expected a Hugging Face causal language model")
    config = options.get("generation_config")
    if config is not None and not isinstance(config, GenerationConfig):
        raise ValueError(f"generation_config: got {_given(config)}, expected a GenerationConfig")
    for name in ("logits_processor", "stopping_criteria"):
        value = options.get(name)
        if value is not None and not isinstance(value, list):
            raise ValueError(f"{name}: got {_given(value)}, expected a list")
    if ids is None:
        return
    if not isinstance(ids, Tensor):
        raise ValueError(f"input_ids: got {_given(ids)}, expected a tensor [B, T]")
    if ids.dim() != 2:
        raise ValueError(f"input_ids: got shape {tuple(ids.shape)}, expected [B, T]")
    check_mask(ids, options.get("attention_mask"))


def check_mask(ids: Tensor, mask: object) -> None:
    """The mask is one of these token ids."""
    if mask is not None and not isinstance(mask, Tensor):
        raise ValueError(f"attention_mask: got {_given(mask)}, expected a tensor {tuple(ids.shape)} (input_ids)")
    if mask is not None and mask.shape != ids.shape:
        raise ValueError(f"attention_mask: got shape {tuple(mask.shape)}, expected {tuple(ids.shape)} (input_ids)")


def check_inputs(input_ids: Tensor, model_inputs: dict) -> None:
    """What Hugging Face hands to a decoding method.

    Raises:
        ValueError: inputs that are no token ids [B, T], a filled cache, positions of one's own, an unknown input.
    """
    for name, value in model_inputs.items():
        if name not in MODEL_INPUTS and value is not None:
            raise ValueError(
                f"{name}: a model input that FIRP does not support, expected only input_ids and attention_mask"
            )
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids: got shape {tuple(input_ids.shape)}, expected [B, T]")
    if input_ids.dtype.is_floating_point or input_ids.dtype is torch.bool:
        raise ValueError(f"input_ids: got dtype {input_ids.dtype}, expected integers")
    for name in CACHES:
        cache = model_inputs.get(name)
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError(
                f"{name}: got a cache of {cache.get_seq_length()} tokens, expected none: FIRP decodes over a static "
                "cache of its own; pass the whole prompt"
            )
    mask = model_inputs.get("attention_mask")
    check_mask(input_ids, mask)
    positions = model_inputs.get("position_ids")
    keep = torch.ones_like(input_ids) if mask is None else mask
    if positions is not None and bool(((positions != keep.cumsum(-1) - 1) & keep.bool()).any()):
        raise ValueError("position_ids: got positions of their own, expected none: every prompt starts at position 0")


def check_vocabulary(prompts: Prompts, model: PreTrainedModel) -> None:
    """Raise ValueError for a token that the model has no embedding for."""
    tokens, size = prompts.ids[prompts.keep], model.get_input_embeddings().weight.shape[0]
    strange = tokens[(tokens < 0) | (tokens >= size)]
    if strange.numel():
        raise ValueError(f"input_ids: got token {int(strange[0])}, expected 0..{size - 1} (the model's embeddings)")


def check_holes(prompts: Prompts, windows: list[int | None], length: int) -> None:
    """Hugging Face counts masked tokens inside a prompt as places of a sliding window; FIRP leaves them out.

    Args:
        windows: of each layer.
        length: tokens of prompt and output together, padding included.
    """
    window = min((window for window in windows if window is not None), default=None)
    if window is None or window >= length:
        return
    for row, (kept, prompt) in enumerate(zip(prompts.tokens, prompts.unpadded, strict=True)):
        if len(kept) < len(prompt):
            raise ValueError(
                f"attention_mask: got {len(prompt) - len(kept)} masked tokens inside the prompt of row {row}, "
                f"expected none: the "
                f"model has a sliding window of {window}, in which they would count"
            )


def check_callbacks(streamer: object, on_step: object, batch_size: int) -> None:
    """What is called back while tokens arrive."""
    if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
        raise ValueError(f"streamer: got {_given(streamer)}, expected an object with put() and end()")
    if streamer is not None and batch_size > 1:
        raise ValueError(f"streamer: got a batch of {batch_size} sequences, expected 1")
    if on_step is not None and not callable(on_step):
        raise ValueError(f"on_step: got {_given(on_step)}, expected a function of a StepEvent")


def check_seed(seed: Any) -> int | None:
    """The seed as an int64, or None."""
    if seed is None:
        return None
    try:
        value = operator.index(seed)
    except TypeError:
        value = None
    if value is None or not -(2**63) <= value < 2**63:
        raise ValueError(f"seed: got {seed!r}, expected an integer of 64 bits, or None")
    return value


def check_autocast(device: torch.device) -> None:
    """Autocast would reach the model's own modules and not the ops between them."""
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
        raise ValueError(
            f"autocast: got torch.autocast({device.type!r}, {dtype}), expected none: load the model in that dtype"
        )
