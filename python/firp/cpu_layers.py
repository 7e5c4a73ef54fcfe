"""On a CPU, let layer views and the head use the package's ops for few rows: a weight is streamed once for all of them.

Modules are replaced by exact type and only where nothing is attached to them (hooks, adapters, quantised weights), so
that what stands in for them computes the same. The model's own modules stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from firp.layer_view import replace_submodule
from firp_kernels import registry

FEW_ROW_DTYPES = (torch.bfloat16, torch.float32)
NORMS = (llama.LlamaRMSNorm, mistral.MistralRMSNorm, qwen2.Qwen2RMSNorm, qwen3.Qwen3RMSNorm)
GATED_MLPS = (llama.LlamaMLP, mistral.MistralMLP, qwen2.Qwen2MLP, qwen3.Qwen3MLP)
ATTENTIONS = (llama.LlamaAttention, mistral.MistralAttention, qwen2.Qwen2Attention)

ops = torch.ops.firp


class FewRowLinear(nn.Module):
    """Stands for an `nn.Linear` of the model in a view, sharing its parameters."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias

    def forward(self, input: Tensor) -> Tensor:
        return ops.linear.default(input, self.weight, self.bias)


class FewRowNorm(nn.Module):
    """Stands for an RMS norm of the model."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight = norm.weight
        self.eps = norm.variance_epsilon

    def forward(self, input: Tensor) -> Tensor:
        return ops.rms_norm.default(input, self.weight, self.eps)


class FewRowMLP(nn.Module):
    """Stands for a gated MLP of the model."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.gate = mlp.gate_proj.weight
        self.up = mlp.up_proj.weight
        self.down = mlp.down_proj.weight

    def forward(self, input: Tensor) -> Tensor:
        return ops.linear.default(ops.gated_linear.default(input, self.gate, self.up), self.down, None)


class FewRowAttention(nn.Module):
    """Stands for an attention block of the model, up to what `AttentionStep` does and after it."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.layer_idx = attention.layer_idx
        self.head_dim = attention.head_dim
        self.scaling = attention.scaling
        holder = attention.config if isinstance(attention, mistral.MistralAttention) else attention
        self.sliding_window = getattr(holder, "sliding_window", None)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            FewRowLinear(getattr(attention, name)) for name in ("q_proj", "k_proj", "v_proj", "o_proj")
        )

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], firp_step, **_) -> tuple[Tensor, None]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (project(hidden_states).view(shape) for project in (self.q_proj, self.k_proj, self.v_proj))
        for rows in (query, key):
            ops.rotary.default(rows, *position_embeddings)
        attended = firp_step.attend(
            self, query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), self.scaling, self.sliding_window
        )
        return self.o_proj(attended.flatten(2)), None


def _plain(module: nn.Module) -> bool:
    """Nothing is attached to the module."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def _served(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype in FEW_ROW_DTYPES
        and registry.owner("linear", "cpu") == "extension"
    )


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear and _plain(module) and _served(module.weight)


def _is_norm(module: nn.Module, dtype: torch.dtype) -> bool:
    return type(module) in NORMS and _plain(module) and _served(module.weight) and module.weight.dtype == dtype


def _is_gated_mlp(module: nn.Module) -> bool:
    return (
        type(module) in GATED_MLPS
        and _plain(module)
        and isinstance(module.act_fn, (nn.SiLU, SiLUActivation))
        and all(_is_linear(child) and child.bias is None for child in (module.gate_proj, module.up_proj, module.down_proj))
    )


def _is_attention(module: nn.Module) -> bool:
    projections = ("q_proj", "k_proj", "v_proj", "o_proj")
    return type(module) in ATTENTIONS and _plain(module) and all(_is_linear(getattr(module, name)) for name in projections)


def _adapt_block(block: nn.Module, dtype: torch.dtype) -> nn.Module:
    if _is_norm(block, dtype):
        return FewRowNorm(block)
    if _is_gated_mlp(block):
        return FewRowMLP(block)
    if _is_attention(block):
        return FewRowAttention(block)
    linears = {name: child for name, child in block.named_children() if _is_linear(child)}
    if not linears:
        return block
    view = copy.copy(block)
    for name, child in linears.items():
        replace_submodule(view, name, FewRowLinear(child))
    return view


def adapt_layer(view: nn.Module) -> nn.Module:
    """Replace what few-row ops can stand for in a layer view; the model's own modules stay as they are."""
    dtype = next(view.parameters()).dtype
    for name, block in list(view.named_children()):
        adapted = _adapt_block(block, dtype)
        if adapted is not block:
            replace_submodule(view, name, adapted)
    return view


def adapt_norm(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """The model's final norm, or the package's over the same weight."""
    norm = model.model.norm
    return FewRowNorm(norm) if _is_norm(norm, model.get_output_embeddings().weight.dtype) else norm


def adapt_head(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """The model's head, or the package's linear over the same weight."""
    head = model.get_output_embeddings()
    return FewRowLinear(head) if _is_linear(head) else head
