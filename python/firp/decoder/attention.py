"""The attention function that layer views hand to Hugging Face's layers, and what it may be asked for."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn
from transformers import AttentionInterface

ATTENTION_NAME = "firp"
# What an attention module may pass on and this function leaves to the layer or to the engine.
HARMLESS = frozenset(["dropout", "is_causal", "position_ids", "use_cache", "output_attentions"])


class AttentionStep(Protocol):
    """What computes the attention of every layer during one pass."""

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float, sliding_window: int | None
    ) -> Tensor:
        """Attention of one layer.

        Args:
            module: the layer's attention module; its `layer_idx` is the 0-based index of the layer.
            query: [B, R, H, D] after rotary, the last dimension dense.
            key, value: [B, R, Hkv, D], key after rotary.
            scale: factor of the scores.
            sliding_window: number of last positions seen, or None.

        Returns:
            [B, R, H, D].
        """


class RotatingStep:
    """Base of an `AttentionStep` that can also rotate: one launch less on a GPU than rotary of its own."""

    def rotate_and_attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float, sliding_window: int | None,
        rotary: tuple[Tensor, Tensor],
    ) -> Tensor:  # fmt: skip
        """Attention of one layer, as `AttentionStep.attend` has it, for queries and keys before rotary.

        Args:
            rotary: cosines and sines [B, R, D] of whole heads, in the half-split layout of Hugging Face's Llama.
        """
        raise NotImplementedError


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    sliding_window: int | None = None,
    *,
    firp_step: AttentionStep,
    **others: object,
) -> tuple[Tensor, None]:
    for name, value_given in others.items():
        if value_given is not None and name not in HARMLESS:
            raise ValueError(f"model: its attention asks for {name}={value_given!r}, which FIRP does not support")
    check_window(module, sliding_window)
    check_heads(module, query.shape[1], key.shape[1], query.shape[3])
    query, key, value = (rows.transpose(1, 2) for rows in (query, key, value))
    return firp_step.attend(module, query, key, value, scaling, sliding_window), None


AttentionInterface.register(ATTENTION_NAME, _attention)


def check_window(module: nn.Module, sliding_window: int | None) -> None:
    """The window that a layer asks for is the one that Hugging Face's masks give it."""
    if sliding_window != module.firp_window:
        raise ValueError(
            f"model: layer {module.layer_idx} attends over a window of {sliding_window}, expected {module.firp_window} "
            "as its config says (sliding_window, layer_types)"
        )


def check_heads(module: nn.Module, heads: int, kv_heads: int, head_dim: int) -> None:
    """The heads of a layer are those that its configuration counts, or this rank's share of them: the cache is made for
    these."""
    expected = module.firp_heads
    if (heads, kv_heads, head_dim) != expected:
        raise ValueError(
            f"model: layer {module.layer_idx} has {heads} query heads and {kv_heads} key heads of {head_dim}, expected "
            f"{expected[0]} and {expected[1]} of {expected[2]} as its config says (pruned heads are not supported)"
        )
