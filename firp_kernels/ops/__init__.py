"""The ops, one file each: schema, contract, fake (shape rule), check of the arguments, and reference (oracle) in torch.

Letters: B sequences, N tree nodes (root included), P lookahead nodes, k offsets, R rows (N, or N + P*k), H query heads,
Hkv key/value heads, D head_dim, S cache slots, V vocabulary, M = ceil(N / 32) mask words, d model width, L layers, K
candidates. Integers are int32, token ids int64.

Rows: node rows come first. The pseudo row of lookahead slot p and offset j (1..k) is row N + p*k + (j - 1). A row's
position is context_lens + depth of its node (+ j). Node 0 is the root; a parent's index is smaller than its child's.
Padding nodes hold token 0, parent -1 and only their own ancestor bit. Empty lookahead slots hold -1. Outputs of padding
rows are finite and ignored, as long as their inputs are finite.

Op `x` is `firp::x`. Calling `firp_kernels.x` goes through torch's dispatcher to the one owner for the device.
`impl="reference"`, "triton" or "extension" asks for an implementation by name and never falls back.
"""

from firp_kernels import registry
from firp_kernels.ops import (
    commit_cache,
    condition_marginals,
    decoder_layers,
    draft_tree,
    emit_tokens,
    gated_linear,
    joint_linear,
    keep_top_p,
    linear,
    lookup_branch,
    norm_qkv_rotary,
    output_norm_mlp,
    predictor_projection,
    rms_norm,
    rotary,
    top_marginals,
    tree_attention,
    update_states,
    verify_tree,
    write_and_attend,
    write_cache,
)

_MODULES = (
    write_cache, tree_attention, write_and_attend, predictor_projection, verify_tree, emit_tokens, commit_cache,
    draft_tree, top_marginals, condition_marginals, lookup_branch, keep_top_p, linear, joint_linear, gated_linear,
    rms_norm, rotary, norm_qkv_rotary, output_norm_mlp, decoder_layers, update_states,
)  # fmt: skip
SCHEMAS = {module.__name__.rpartition(".")[2]: module.SCHEMA for module in _MODULES}

registry.define(dict(zip(SCHEMAS, _MODULES, strict=True)))
