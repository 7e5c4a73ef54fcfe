"""What replaces the blocks of a layer, and for whole layers, on a CPU: the package's ops over the model's parameters.

Each computes what the Hugging Face module computes, in its roundings, in as few calls as there are: a layer's own small
calls are a good part of a step.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace

from torch import Tensor, nn
from transformers.models.mistral.modeling_mistral import MistralAttention

from firp.decoder.attention import AttentionStep, check_heads, check_window


class FewRowLinear(nn.Module):
    """Replaces an `nn.Linear` of the model in a view, sharing its parameters."""

    OPS = ("linear",)

    def __init__(self, linear: nn.Linear, ops: SimpleNamespace) -> None:
        super().__init__()
        self.ops = ops
        self.weight = linear.weight
        self.bias = linear.bias

    def forward(self, input: Tensor) -> Tensor:
        return self.ops.linear(input, self.weight, self.bias)


class FewRowNorm(nn.Module):
    """Replaces an RMS norm of the model."""

    OPS = ("rms_norm",)

    def __init__(self, norm: nn.Module, ops: SimpleNamespace) -> None:
        super().__init__()
        self.ops = ops
        self.weight = norm.weight
        self.eps = norm.variance_epsilon

    def forward(self, input: Tensor) -> Tensor:
        return self.ops.rms_norm(input, self.weight, self.eps)


class FewRowMLP(nn.Module):
    """Replaces a gated MLP of the model."""

    OPS = ("linear", "gated_linear")

    def __init__(self, mlp: nn.Module, ops: SimpleNamespace) -> None:
        super().__init__()
        self.ops = ops
        # In a tuple parameters are attributes like any other; a module looks its own up in a slow call of its own.
        self.weights = (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)

    def forward(self, input: Tensor) -> Tensor:
        gate, up, down = self.weights
        return self.ops.linear(self.ops.gated_linear(input, gate, up), down, None)


class FewRowAttention(nn.Module):
    """Replaces an attention block of the model; an `AttentionStep` attends."""

    OPS = ("linear", "joint_linear", "rotary")

    def __init__(self, attention: nn.Module, ops: SimpleNamespace) -> None:
        super().__init__()
        self.ops = ops
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        self.layer_idx = attention.layer_idx
        self.head_dim = attention.head_dim
        self.scaling = attention.scaling
        holder = attention.config if isinstance(attention, MistralAttention) else attention
        self.sliding_window = getattr(holder, "sliding_window", None)
        self.weights = [projection.weight for projection in projections]
        self.biases = [projection.bias for projection in projections if projection.bias is not None]
        self.output = (attention.o_proj.weight, attention.o_proj.bias)
        heads, kv_heads, _ = (weight.shape[0] // self.head_dim for weight in self.weights)
        check_window(attention, self.sliding_window)
        check_heads(attention, heads, kv_heads, self.head_dim)
        self.rotated = [heads + kv_heads, kv_heads]
        self.heads = [heads, kv_heads]

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], firp_step: AttentionStep, **_: object
    ) -> tuple[Tensor, None]:
        batch, rows, _ = hidden_states.shape
        joint = self.ops.joint_linear(hidden_states, self.weights, self.biases).view(batch, rows, -1, self.head_dim)
        rotated, value = joint.split_with_sizes(self.rotated, 2)
        self.ops.rotary(rotated, *position_embeddings)
        query, key = rotated.split_with_sizes(self.heads, 2)
        attended = firp_step.attend(self, query, key, value, self.scaling, self.sliding_window)
        return self.ops.linear(attended.flatten(2), *self.output), None


class FewRowLayer(nn.Module):
    """Replaces a decoder layer of the model: attention and gated MLP, each after an RMS norm and added to
    its input."""

    OPS = ("rms_norm", *FewRowAttention.OPS, *FewRowMLP.OPS)

    def __init__(self, layer: nn.Module, ops: SimpleNamespace) -> None:
        super().__init__()
        self.ops = ops
        norms = (layer.input_layernorm, layer.post_attention_layernorm)
        self.norms = tuple((norm.weight, norm.variance_epsilon) for norm in norms)
        # Called without the machinery of a module: nothing is attached to them.
        self.attend = FewRowAttention(layer.self_attn, ops).forward
        self.feed = FewRowMLP(layer.mlp, ops).forward

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], firp_step: AttentionStep, **_: object
    ) -> Tensor:
        before_attention, before_mlp = self.norms
        normed = self.ops.rms_norm(hidden_states, *before_attention)
        hidden_states = hidden_states + self.attend(normed, position_embeddings, firp_step)[0]
        return hidden_states + self.feed(self.ops.rms_norm(hidden_states, *before_mlp))


def ops_of(parts: Iterable[object]) -> set[str]:
    """Names of the package's ops that these views of a model run."""
    modules = [module for part in parts if isinstance(part, nn.Module) for module in part.modules()]
    return {name for module in modules for name in getattr(module, "OPS", ())}
