"""On a CPU, let layer views and the head use the package's ops for few rows: a weight is streamed once for all of them.

Modules are replaced by exact type and only where nothing is attached to them (hooks, adapters, quantised weights), so
that what stands in for them computes the same. The model's own modules stay as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3

import firp_kernels
from firp.decoder.few_row_modules import FewRowAttention, FewRowLayer, FewRowLinear, FewRowMLP, FewRowNorm
from firp.decoder.view import Adapters, replace_submodule, shallow
from firp_kernels import registry

FEW_ROW_DTYPES = (torch.bfloat16, torch.float32)
NORMS = (llama.LlamaRMSNorm, mistral.MistralRMSNorm, qwen2.Qwen2RMSNorm, qwen3.Qwen3RMSNorm)
GATED_MLPS = (llama.LlamaMLP, mistral.MistralMLP, qwen2.Qwen2MLP, qwen3.Qwen3MLP)
ATTENTIONS = (llama.LlamaAttention, mistral.MistralAttention, qwen2.Qwen2Attention)
LAYERS = (llama.LlamaDecoderLayer, mistral.MistralDecoderLayer, qwen2.Qwen2DecoderLayer)


# An engine asks this of every module of a layer. `vars` is past `nn.Module.__getattr__`, which would take most of it.


def _plain(module: nn.Module) -> bool:
    """Nothing is attached to the module."""
    own = vars(module)
    return not (own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own)


def _supported(weight: Tensor | None) -> bool:
    return (
        weight is not None
        and type(weight) is nn.Parameter
        and weight.device.type == "cpu"
        and weight.dtype in FEW_ROW_DTYPES
        and registry.owner("linear", "cpu") == "extension"
    )


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear and _plain(module) and _supported(vars(module)["_parameters"].get("weight"))


def _has_bias(linear: nn.Module) -> bool:
    return vars(linear)["_parameters"].get("bias") is not None


def _is_norm(module: nn.Module, dtype: torch.dtype) -> bool:
    if type(module) not in NORMS or not _plain(module):
        return False
    weight = vars(module)["_parameters"].get("weight")
    return _supported(weight) and weight.dtype == dtype


def _is_gated_mlp(module: nn.Module) -> bool:
    if type(module) not in GATED_MLPS or not _plain(module):
        return False
    own = vars(module)["_modules"]
    linears = own["gate_proj"], own["up_proj"], own["down_proj"]
    activation = type(own["act_fn"]) in (nn.SiLU, SiLUActivation)
    return activation and all(_is_linear(child) and not _has_bias(child) for child in linears)


def _is_attention(module: nn.Module) -> bool:
    if type(module) not in ATTENTIONS or not _plain(module):
        return False
    own = vars(module)["_modules"]
    joined = [own["q_proj"], own["k_proj"], own["v_proj"]]
    linear = all(_is_linear(projection) for projection in [*joined, own["o_proj"]])
    return linear and sum(map(_has_bias, joined)) in (0, len(joined))


def _is_layer(module: nn.Module, dtype: torch.dtype) -> bool:
    if type(module) not in LAYERS or not _plain(module):
        return False
    own = vars(module)["_modules"]
    norms = own["input_layernorm"], own["post_attention_layernorm"]
    return _is_attention(own["self_attn"]) and _is_gated_mlp(own["mlp"]) and all(_is_norm(n, dtype) for n in norms)


def _adapt_block(block: nn.Module, dtype: torch.dtype, ops: SimpleNamespace) -> nn.Module:
    if _is_norm(block, dtype):
        return FewRowNorm(block, ops)
    if _is_gated_mlp(block):
        return FewRowMLP(block, ops)
    if _is_attention(block):
        return FewRowAttention(block, ops)
    linears = {name: child for name, child in block.named_children() if _is_linear(child)}
    if not linears:
        return block
    view = shallow(block)
    for name, child in linears.items():
        replace_submodule(view, name, FewRowLinear(child, ops))
    return view


def adapt_layer(view: nn.Module, ops: SimpleNamespace) -> nn.Module:
    """Replace a layer view, or the parts that few-row ops can replace; the model's own modules stay as they are."""
    dtype = next(view.parameters()).dtype
    if _is_layer(view, dtype):
        return FewRowLayer(view, ops)
    for name, block in list(view.named_children()):
        adapted = _adapt_block(block, dtype, ops)
        if adapted is not block:
            replace_submodule(view, name, adapted)
    return view


def adapt_norm(model: PreTrainedModel, ops: SimpleNamespace) -> Callable[[Tensor], Tensor]:
    """The model's final norm, or the package's over the same weight."""
    norm = model.model.norm
    return FewRowNorm(norm, ops) if _is_norm(norm, model.get_output_embeddings().weight.dtype) else norm


def adapt_head(model: PreTrainedModel, ops: SimpleNamespace) -> Callable[[Tensor], Tensor]:
    """The model's head, or the package's linear over the same weight."""
    head = model.get_output_embeddings()
    return FewRowLinear(head, ops) if _is_linear(head) else head


def adapters_over(ops: SimpleNamespace) -> Adapters:
    """What replaces parts of a model by these ops."""
    layer, norm, head = (functools.partial(adapt, ops=ops) for adapt in (adapt_layer, adapt_norm, adapt_head))
    return Adapters(layer, norm, head)


def _whole(layers: list[nn.Module]) -> bool:
    return all(isinstance(layer, FewRowLayer) for layer in layers)


@functools.cache
def usual_adapters() -> Adapters:
    """Those over torch's own dispatch: one object, by which the views of one engine serve the next."""
    return adapters_over(firp_kernels.bind(None))._replace(keeps=_whole)
