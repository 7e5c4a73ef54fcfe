"""Kernels of FIRP speculative decoding: tensors in, tensors out."""

from firp_kernels.ops.commit_cache import commit_cache
from firp_kernels.ops.condition_marginals import condition_marginals
from firp_kernels.ops.decoder_layers import decoder_layers
from firp_kernels.ops.draft_tree import draft_tree
from firp_kernels.ops.emit_tokens import Emitted, emit_tokens
from firp_kernels.ops.gated_linear import gated_linear
from firp_kernels.ops.joint_linear import joint_linear
from firp_kernels.ops.keep_top_p import keep_top_p
from firp_kernels.ops.linear import linear
from firp_kernels.ops.lookup_branch import lookup_branch
from firp_kernels.ops.norm_qkv_rotary import norm_qkv_rotary
from firp_kernels.ops.output_norm_mlp import output_norm_mlp
from firp_kernels.ops.predictor_projection import predictor_projection
from firp_kernels.ops.rms_norm import rms_norm
from firp_kernels.ops.rotary import rotary
from firp_kernels.ops.top_marginals import top_marginals
from firp_kernels.ops.tree_attention import tree_attention
from firp_kernels.ops.update_states import update_states
from firp_kernels.ops.verify_tree import Verified, verify_tree
from firp_kernels.ops.write_and_attend import write_and_attend
from firp_kernels.ops.write_cache import write_cache
from firp_kernels.registry import bind, cpu_isa
from firp_kernels.version import __version__

__all__ = [
    "Emitted",
    "Verified",
    "__version__",
    "bind",
    "commit_cache",
    "condition_marginals",
    "cpu_isa",
    "decoder_layers",
    "draft_tree",
    "emit_tokens",
    "gated_linear",
    "joint_linear",
    "keep_top_p",
    "linear",
    "lookup_branch",
    "norm_qkv_rotary",
    "output_norm_mlp",
    "predictor_projection",
    "rms_norm",
    "rotary",
    "top_marginals",
    "tree_attention",
    "update_states",
    "verify_tree",
    "write_and_attend",
    "write_cache",
]
