"""What engines of well-known shapes launch on a GPU, recorded without one.

    python tests/decode/launched.py --arch 90 [--every]

An engine takes real steps over fake tensors, and Triton's own binder says which variants of the kernels they ask for.
"""

from __future__ import annotations

import argparse
import itertools
import sys

import firp
import pytest
import torch
from accelerator import watch_step
from firp.decoder import joint_linears
from firp.engine.buffers import allocated_slots
from firp.sampling.choosers import Vectorised
from transformers import AutoConfig, AutoModelForCausalLM, LogitsProcessorList, TemperatureLogitsWarper

from benchmarks.shapes import CONTEXTS, SHAPES, TREES, Shape, Tree
from firp_kernels.triton import aot
from firp_kernels.triton.variants import recorded, without_device

ONE = {"llama3-8b": (torch.bfloat16,)}
EVERY = {
    "llama2-7b": (torch.bfloat16,), "llama3-8b": (torch.bfloat16,),
    "smollm2-135m": (torch.bfloat16, torch.float16, torch.float32),
}  # fmt: skip
LAYERS = 2
# The ops of a step that have a Triton kernel, without a predictor and with one.
PLAIN_OPS = "write_and_attend", "verify_tree", "emit_tokens"
DRAFTING_OPS = *PLAIN_OPS, "predictor_projection", "top_marginals", "condition_marginals"


def sampling(engine):
    return Vectorised(engine.ops, LogitsProcessorList([TemperatureLogitsWarper(0.7)]), 1, None, [0])


def take_step(shape: Shape, dtype: torch.dtype, tree: Tree, context: int, **options) -> None:
    """One step of an engine over fake tensors, as it runs on a GPU; `options` are those of `watch_step`."""
    with torch.device("meta"):
        config = AutoConfig.for_model(
            "llama", vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=shape.mlp_width,
            num_hidden_layers=LAYERS, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim, max_position_embeddings=8192,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        predictor, size = None, None
        if tree.num_lookahead:
            predictor = firp.FirpPredictor.for_model(model, tree.num_offsets, 1, transition_rank=64).to(dtype)
            size = firp.TreeConfig(tree.num_nodes, tree.num_lookahead)
    with pytest.MonkeyPatch.context() as patch:
        # Queries, keys and values are one product on a GPU, and so are strided.
        patch.setattr(joint_linears, "_joinable", lambda *linears: True)
        patch.setattr(joint_linears, "available_memory", lambda device: 1 << 40)
        watch_step(
            patch, model, predictor, size, slots=allocated_slots(context + tree.rows),
            impl=dict.fromkeys(PLAIN_OPS if predictor is None else DRAFTING_OPS, "triton"), **options,
        )  # fmt: skip


def take_steps(models: dict[str, tuple[torch.dtype, ...]], trees: tuple[Tree, ...], contexts: tuple[int, ...]) -> None:
    """Greedy and sampled steps with full trees, and first steps, of each shape and its dtypes."""
    for name, dtypes in models.items():
        for dtype in dtypes:
            for tree, context in itertools.product(trees, contexts):
                take_step(SHAPES[name], dtype, tree, context, batch_size=1)
            for tree in trees:
                take_step(SHAPES[name], dtype, tree, contexts[0], batch_size=1, choose=sampling)
                take_step(SHAPES[name], dtype, tree, contexts[0], batch_size=1, looks_up="triton")
            for context in contexts:
                take_step(SHAPES[name], dtype, trees[1], context, batch_size=1, drafted=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, choices=aot.ARCHITECTURES, required=True)
    parser.add_argument("--every", action="store_true", help="every shape and tree, and other dtypes of one")
    options = parser.parse_args()
    # Plain decoding and the largest tree.
    trees = TREES["cuda"] if options.every else TREES["cuda"][::2]
    with recorded(options.arch) as found:
        take_steps(EVERY if options.every else ONE, trees, CONTEXTS["cuda"])
    print(aot.HEADER)
    kernels, passed = set(), []
    for variant in found.values():
        compiled = aot.compile_variant(variant, options.arch)
        kernels.add(compiled.hash)
        passed.append(aot.report(variant.kernel.__module__.rpartition(".")[2], variant, compiled, options.arch))
    print(f"{len(passed)} variants, {passed.count(False)} over a limit")
    # Triton itself compiles what is launched here.
    with without_device(options.arch) as launched:
        take_steps(ONE, trees, CONTEXTS["cuda"][1:])
    unlisted = {kernel.name for kernel in launched if kernel.hash not in kernels}
    print(f"{len(launched)} launches, of kernels that are not among them: {', '.join(sorted(unlisted)) or 'none'}")
    return 0 if all(passed) and not unlisted else 1


if __name__ == "__main__":
    sys.exit(main())
