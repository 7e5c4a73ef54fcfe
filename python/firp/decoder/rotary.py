"""Rotary embeddings whose frequencies follow the length of the sequence, without writing to the model.

Hugging Face picks the frequencies of "dynamic" and "longrope" by the longest position of a forward and stores them in
the model's buffers. Draft rows would count there, and so would earlier calls. Here each row follows the length at which
one sequence, decoded token by token, meets it: its own position + 1, or the prompt's length during prefill.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

FIXED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
LENGTH_ROPE_TYPES = ("dynamic", "longrope")

Frequencies = Callable[[Tensor], Tensor]


def rope_type_of(config: PreTrainedConfig) -> str:
    """The kind of RoPE that a model's configuration names."""
    return (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")


def context_limit(config: PreTrainedConfig) -> int:
    """Tokens that prompt and output may hold together; "dynamic" stretches the trained context by its factor."""
    limit = config.max_position_embeddings
    return int(limit * config.rope_parameters["factor"]) if rope_type_of(config) == "dynamic" else limit


def check_positions(config: PreTrainedConfig, prompt_length: int, max_new_tokens: int) -> None:
    """Raise ValueError for a request that the model's positions do not allow."""
    limit, total = context_limit(config), prompt_length + max_new_tokens
    if prompt_length >= limit:
        raise ValueError(
            f"input_ids: got a prompt of {prompt_length} tokens, expected at most {limit - 1}: the model's context "
            f"holds {limit}, a new token included"
        )
    if total > limit:
        raise ValueError(
            f"max_new_tokens: got {max_new_tokens} after a prompt of {prompt_length} tokens, expected at most "
            f"{limit - prompt_length}: the model's context holds {limit}"
        )
    if config.model_type == "phi3" and rope_type_of(config) == "longrope":
        trained = config.rope_parameters["original_max_position_embeddings"]
        if prompt_length <= trained < total:
            raise ValueError(
                f"max_new_tokens: got {max_new_tokens}, expected at most {trained - prompt_length}: past {trained} "
                "tokens Phi-3 computes its whole cache again with other frequencies, which FIRP does not follow"
            )


def _dynamic_frequencies(config: PreTrainedConfig, device: torch.device) -> Frequencies:
    """Lengths [...] on `device` to inverse frequencies [..., dim / 2], NTK-scaled past the trained context."""
    parameters, trained = config.rope_parameters, config.max_position_embeddings
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dim, factor = int(width * parameters.get("partial_rotary_factor", 1.0)), parameters["factor"]
    exponents = torch.arange(0, dim, 2, device=device).float() / dim

    def frequencies(lengths: Tensor) -> Tensor:
        stretch = factor * lengths.clamp(min=trained) / trained - (factor - 1)
        base = parameters["rope_theta"] * stretch ** (dim / (dim - 2))
        return 1.0 / base[..., None] ** exponents

    return frequencies


def _longrope_frequencies(config: PreTrainedConfig, device: torch.device) -> Frequencies:
    """Lengths [...] on `device` to inverse frequencies [..., dim / 2]: one set within the trained context, another past
    it.
    """
    trained = config.rope_parameters["original_max_position_embeddings"]
    sets = (ROPE_INIT_FUNCTIONS["longrope"](config, None, seq_len=trained + past)[0] for past in (0, 1))
    # Moved once: a copy from the host in a step would make it wait, and no capture allows one.
    short, long = (frequencies.to(device) for frequencies in sets)

    def frequencies(lengths: Tensor) -> Tensor:
        return torch.where((lengths > trained)[..., None], long, short)

    return frequencies


class LengthRotary:
    """Cosines and sines of "dynamic" and "longrope" embeddings, on the device that the module is on.

    Args:
        module: the decoder's own rotary embedding; only read.
        config: the model's.
    """

    def __init__(self, module: nn.Module, config: PreTrainedConfig) -> None:
        makers = {"dynamic": _dynamic_frequencies, "longrope": _longrope_frequencies}
        self.device = module.inv_freq.device
        self.frequencies = makers[rope_type_of(config)](config, self.device)
        self.module = module
        self.check()

    def check(self) -> None:
        """Raise ValueError unless the frequencies in the model's own module are those of its configuration."""
        module, longest = self.module, self.module.config.max_position_embeddings
        lengths = torch.tensor([1, longest + 1, int(module.max_seq_len_cached)], device=self.device)
        known = self.frequencies(lengths).float().cpu()
        for name in ("original_inv_freq", "inv_freq"):
            found = getattr(module, name).float().cpu()
            if not any(found.shape == own.shape and torch.allclose(found, own, rtol=1e-2) for own in known):
                raise ValueError(
                    f"model: model.rotary_emb.{name} holds other frequencies than config.rope_parameters give, "
                    f"expected those of rope_type {rope_type_of(module.config)!r}"
                )

    @torch.no_grad()
    def __call__(self, hidden: Tensor, position_ids: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, R, D] of position ids [B, R], for rows met at the lengths [B], or one by one."""
        lengths = position_ids + 1 if lengths is None else lengths[:, None].expand_as(position_ids)
        angles = position_ids[..., None].float() * self.frequencies(lengths)
        angles = torch.cat([angles, angles], -1)
        scaling = self.module.attention_scaling
        return (angles.cos() * scaling).to(hidden.dtype), (angles.sin() * scaling).to(hidden.dtype)
