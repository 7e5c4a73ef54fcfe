"""On a CPU, let layer views and the head use the package's linear, which streams a weight once for a few rows."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from firp.layer_view import replace_submodule
from firp_kernels import registry

FEW_ROW_DTYPES = (torch.bfloat16, torch.float32)


class FewRowLinear(nn.Module):
    """Stands for an `nn.Linear` of the model in a view, sharing its parameters."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias

    def forward(self, input: Tensor) -> Tensor:
        return torch.ops.firp.linear.default(input, self.weight, self.bias)


def _replaceable(module: nn.Module) -> bool:
    """A plain linear on a CPU, without hooks, in a dtype the extension serves."""
    return (
        type(module) is nn.Linear
        and module.weight.device.type == "cpu"
        and module.weight.dtype in FEW_ROW_DTYPES
        and not (module._forward_hooks or module._forward_pre_hooks)
        and registry.owner("linear", "cpu") == "extension"
    )


def adapt_layer(view: nn.Module) -> nn.Module:
    """Replace the plain linears in a layer view's attention and MLP; the model's own modules stay as they are."""
    for block_name, block in list(view.named_children()):
        linears = {name: child for name, child in block.named_children() if _replaceable(child)}
        if linears:
            block_view = copy.copy(block)
            for name, child in linears.items():
                replace_submodule(block_view, name, FewRowLinear(child))
            replace_submodule(view, block_name, block_view)
    return view


def adapt_head(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """The model's head, or the package's linear over the same weight."""
    head = model.get_output_embeddings()
    return FewRowLinear(head) if _replaceable(head) else head
