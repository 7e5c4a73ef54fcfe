"""Write a step's keys and values, then attend: the launches of `write_cache` and `tree_attention`, no kernel more."""

from __future__ import annotations

from types import SimpleNamespace

from torch import Tensor

from firp_kernels.ops.write_and_attend import composed
from firp_kernels.triton.tree_attention import tree_attention
from firp_kernels.triton.write_cache import write_cache


def write_and_attend(*args) -> Tensor:
    """`firp_kernels.write_and_attend` on a CUDA device."""
    return composed(SimpleNamespace(write_cache=write_cache, tree_attention=tree_attention), *args)
