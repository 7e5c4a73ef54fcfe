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
from firp_kernels.version import __version__

__all__ = [
    "__version__",
    "bind",
    "commit_cache",
    "draft_tree",
    "linear",
    "predictor_projection",
    "tree_attention",
    "verify_tree",
    "write_cache",
]
