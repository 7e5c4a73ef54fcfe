"""Implementations that an engine was asked for by name: which of its ops they are, and that it runs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace

import torch
from torch import Tensor

from firp.decoder.few_row_modules import ops_of
from firp.decoder.view import DecoderView
from firp.drafting.predictor import FirpPredictor
from firp.drafting.trees import TreeConfig
from firp_kernels.ops.decoder_layers import PARTS
from firp_kernels.registry import owner

STEP = {"write_cache", "tree_attention", "write_and_attend", "verify_tree", "emit_tokens", "commit_cache"}
DRAFTING = {"predictor_projection", "top_marginals", "draft_tree"}


def check_named(
    impl: str | Mapping[str, str] | None, view: DecoderView, predictor: FirpPredictor | None, tree: TreeConfig | None
) -> None:
    """Raise ValueError for an op in a mapping that no step of this engine runs."""
    if not isinstance(impl, Mapping):
        return
    run = STEP | ops_of([*view.layers, view.norm, view.head])
    run |= set() if view.device.type == "cpu" else {"keep_top_p"}
    if predictor is not None:
        # An updated row of offset 1 knows the token before (`firp.drafting.drafters`).
        conditions = predictor.transition_rank and not (predictor.update_width and predictor.num_offsets == 1)
        run |= DRAFTING | ({"condition_marginals"} if conditions else set())
        run |= {"linear", "update_states"} if predictor.update_width else set()
        run -= {"draft_tree"} if (tree or predictor.tree).kind == "static" else set()
    if unused := sorted(impl.keys() - run):
        raise ValueError(
            f"impl: got {unused[0]!r}, expected ops that this engine runs: {', '.join(sorted(run))}; it "
            + ("drafts nothing" if unused[0] in DRAFTING and predictor is None else _in_place_of(unused[0]))
        )
    parts = sorted(impl.keys() & {"write_cache", "tree_attention"})
    if parts and "write_and_attend" in impl:
        raise ValueError(
            f"impl: got {parts[0]!r} beside 'write_and_attend', expected one of them: it is a part of that"
        )


def _in_place_of(op: str) -> str:
    return f"runs {', '.join(PARTS)} in its place" if op == "decoder_layers" else "runs torch's in its place"


def prefill_attention(
    impl: str | Mapping[str, str] | None, ops: SimpleNamespace, device: torch.device
) -> Callable[..., Tensor] | None:
    """The op that prompts attend with: the extension's on a CPU; None is torch's own attention."""
    named = impl.get("tree_attention") if isinstance(impl, Mapping) else impl
    on_cpu = device.type == "cpu" and owner("tree_attention", "cpu") == "extension"
    return ops.tree_attention if on_cpu and named in (None, "extension") else None
