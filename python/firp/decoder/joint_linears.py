"""On a GPU, let layer views take queries, keys and values in one product, and gate and up in another, and let attention
rotate: four launches fewer.

The weights side by side are a copy. Every `JointLinears.refresh`, at the start of a run, makes it again, which costs
about what a step costs: a weight that changed in place looks like one that did not. The model's own modules
stay as they are, and so do all that are not plain linears: quantised, adapted, hooked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from firp.decoder.attention import AttentionStep, RotatingStep, check_heads, check_window
from firp.decoder.view import DecoderView, replace_submodule
from firp.tools.hardware import available_memory
from firp_kernels.ops.rotary import rotated

ATTENTIONS = (llama.LlamaAttention, mistral.MistralAttention, qwen2.Qwen2Attention)
GATED_MLPS = (llama.LlamaMLP, mistral.MistralMLP, qwen2.Qwen2MLP, qwen3.Qwen3MLP)
# Of the free memory, what copies may take: the cache needs more.
LARGEST_SHARE = 0.25


class JointLinear(nn.Module):
    """Several linears over the same rows, their outputs side by side; `JointLinears.refresh` fills the weights."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        super().__init__()
        weight, rows = linears[0].weight, sum(linear.weight.shape[0] for linear in linears)
        self.register_buffer("weight", weight.new_empty(rows, weight.shape[1]))
        self.register_buffer("bias", None if linears[0].bias is None else weight.new_empty(rows))
        sizes = [linear.weight.shape[0] for linear in linears]
        # Outside of the module's children: they are the model's.
        self.pairs = list(zip(self.weight.split(sizes), (linear.weight for linear in linears), strict=True))
        if self.bias is not None:
            self.pairs += zip(self.bias.split(sizes), (linear.bias for linear in linears), strict=True)

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight, self.bias)


class JointMLP(nn.Module):
    """Replaces a gated MLP of the model."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.joint = JointLinear((mlp.gate_proj, mlp.up_proj))
        self.act_fn, self.down_proj = mlp.act_fn, mlp.down_proj

    def forward(self, input: Tensor) -> Tensor:
        gate, up = self.joint(input).chunk(2, -1)
        return self.down_proj(self.act_fn(gate) * up)


class JointAttention(nn.Module):
    """Replaces an attention block of the model; an `AttentionStep` attends, and rotates where it can.

    The blocks that it replaces rotate whole heads in the half-split layout. All others, such as those that rotate a
    part of a head or interleaved pairs, stay and rotate by themselves.
    """

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        self.joint, self.o_proj = JointLinear(projections), attention.o_proj
        self.layer_idx, self.head_dim, self.scaling = attention.layer_idx, attention.head_dim, attention.scaling
        holder = attention.config if isinstance(attention, mistral.MistralAttention) else attention
        self.sliding_window = getattr(holder, "sliding_window", None)
        heads, kv_heads, _ = (linear.weight.shape[0] // self.head_dim for linear in projections)
        check_window(attention, self.sliding_window)
        check_heads(attention, heads, kv_heads, self.head_dim)
        self.heads, self.kv_heads = heads, kv_heads

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], firp_step: AttentionStep, **_: object
    ) -> tuple[Tensor, None]:
        batch, rows, _ = hidden_states.shape
        joint = self.joint(hidden_states).view(batch, rows, -1, self.head_dim)
        settings = self.scaling, self.sliding_window
        if isinstance(firp_step, RotatingStep):
            query, key, value = joint.split((self.heads, self.kv_heads, self.kv_heads), 2)
            attended = firp_step.rotate_and_attend(self, query, key, value, *settings, position_embeddings)
        else:
            rows_of_both, value = joint.split((self.heads + self.kv_heads, self.kv_heads), 2)
            query, key = rotated(rows_of_both, *position_embeddings).split((self.heads, self.kv_heads), 2)
            attended = firp_step.attend(self, query, key, value, *settings)
        return self.o_proj(attended.reshape(batch, rows, -1)), None


def _plain(module: nn.Module) -> bool:
    """Nothing is attached to the module."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def _joinable(*linears: nn.Module) -> bool:
    """Plain linears of one dtype on a GPU, with biases or without."""
    return (
        all(
            type(linear) is nn.Linear
            and _plain(linear)
            and type(linear.weight) is nn.Parameter
            and linear.weight.device.type == "cuda"
            and linear.weight.dtype == linears[0].weight.dtype
            for linear in linears
        )
        and len({linear.bias is None for linear in linears}) == 1
    )


def _blocks(layer: nn.Module) -> dict[str, type]:
    """Names of the blocks of a layer view that others can replace, and what these are."""
    found: dict[str, type] = {}
    attention: Any = getattr(layer, "self_attn", None)
    mlp: Any = getattr(layer, "mlp", None)
    if (
        type(attention) in ATTENTIONS
        and _plain(attention)
        and _joinable(attention.q_proj, attention.k_proj, attention.v_proj)
    ):
        found["self_attn"] = JointAttention
    if type(mlp) in GATED_MLPS and _plain(mlp) and _joinable(mlp.gate_proj, mlp.up_proj):
        found["mlp"] = JointMLP
    return found


def _copied_bytes(layer: nn.Module, names: dict[str, type]) -> int:
    linears = {"self_attn": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj")}
    held = [getattr(getattr(layer, name), linear) for name in names for linear in linears[name]]
    return sum(parameter.nbytes for linear in held for parameter in linear.parameters())


class JointLinears:
    """The joint linears of a view's layers, put in place where the layers allow it and the copies fit."""

    def __init__(self, view: DecoderView) -> None:
        blocks = [(layer, names) for layer in view.layers if (names := _blocks(layer))]
        copied = sum(_copied_bytes(layer, names) for layer, names in blocks)
        self._copies: list[Tensor] = []
        self._weights: list[Tensor] = []
        if not blocks or copied > LARGEST_SHARE * available_memory(view.device):
            return
        for layer, names in blocks:
            for name, stand_in in names.items():
                block = stand_in(getattr(layer, name))
                replace_submodule(layer, name, block)
                for copy, weight in block.joint.pairs:
                    self._copies.append(copy)
                    self._weights.append(weight)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the model's weights as they are now; what was captured over the copies reads the new values."""
        if self._copies:
            torch._foreach_copy_(self._copies, self._weights)
