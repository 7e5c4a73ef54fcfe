"""Kernels of FIRP speculative decoding: tensors in, tensors out."""

from firp_kernels.ops import (
    bind,
    commit_cache,
    draft_tree,
    linear,
    predictor_projection,
    tree_attention,
    verify_tree,
    write_cache,
)

__version__ = "0.1.0"
__all__ = [
    "bind",
    "commit_cache",
    "draft_tree",
    "linear",
    "predictor_projection",
    "tree_attention",
    "verify_tree",
    "write_cache",
]
