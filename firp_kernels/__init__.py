"""Kernels of FIRP speculative decoding: tensors in, tensors out."""

from firp_kernels.ops import (
    bind,
    commit_cache,
    draft_tree,
    predictor_projection,
    tree_attention,
    verify_tree,
    write_cache,
)
from firp_kernels.row_ops import (
    condition_marginals,
    gated_linear,
    joint_linear,
    linear,
    rms_norm,
    rotary,
    top_marginals,
)
from firp_kernels.version import __version__

__all__ = [
    "__version__",
    "bind",
    "commit_cache",
    "condition_marginals",
    "draft_tree",
    "gated_linear",
    "joint_linear",
    "linear",
    "predictor_projection",
    "rms_norm",
    "rotary",
    "top_marginals",
    "tree_attention",
    "verify_tree",
    "write_cache",
]
