"""Figure 1a: speedup over plain decoding against draft size. Everything is decoded and timed, in turns.

python -m benchmarks.paper.figure_1a --dtype bfloat16 --heads heads
"""

from __future__ import annotations

from typing import Any

import firp
import torch
from firp.bench.runner import TAU_FORMULA

from benchmarks.baselines.compare import drafting_methods, interleaved, made_from
from benchmarks.paper.setup import NAMES, Setup

NAME = "figure-1a"
SIZES = (2, 4, 8, 16, 32, 64)


def measure(setup: Setup) -> None:
    """Parts by size: the figures of `firp bench`, all prompts and by category."""
    document = setup.document(
        NAME, sizes=SIZES, repeats=setup.repeats, tau=TAU_FORMULA, tree="dynamic, N nodes with the root, P = N",
        device=setup.model.device.type, threads=torch.get_num_threads(),
    )  # fmt: skip

    def part(size: int) -> dict:
        tree, k = firp.TreeConfig(size, size), setup.num_offsets
        methods = drafting_methods(setup.model, setup.predictor, tree, k, setup.heads, size)
        return interleaved(
            methods, setup.chosen_prompts, setup.model, setup.tokenizer, setup.max_new_tokens, setup.repeats
        )

    for size in SIZES:
        document.part(str(size), made_from(setup.predictor, setup.heads), lambda size=size: part(size))


def draw(document: dict, pyplot: Any) -> Any:
    parts = {int(size): part["figures"]["methods"] for size, part in document["parts"].items()}
    drawn, axes = pyplot.subplots(figsize=(6, 4))
    for name in next(iter(parts.values())):
        if name == "ar":
            continue
        spread = [methods[name]["speedup_vs_ar"] for methods in parts.values()]
        middle = [s["median"] for s in spread]
        errors = [[s["median"] - s["min"] for s in spread], [s["max"] - s["median"] for s in spread]]
        axes.errorbar(list(parts), middle, yerr=errors, marker="o", capsize=3, label=NAMES[name])
    axes.axhline(1, color="grey", linestyle=":", label="plain decoding")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="nodes of the draft tree, root included", ylabel="speedup over plain decoding")
    axes.legend()
    drawn.tight_layout()
    return drawn


if __name__ == "__main__":
    from benchmarks.paper.alone import alone

    alone(NAME)
