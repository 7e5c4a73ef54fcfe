"""The table: tau and speedup by category, each drafter with 16 nodes. Everything is decoded and timed, in turns.

python -m benchmarks.paper.table --dtype bfloat16 --heads heads
"""

from __future__ import annotations

from typing import Any

import firp
import torch
from firp.bench.runner import TAU_FORMULA
from firp.tools.figures import cut

from benchmarks.baselines.compare import drafting_methods, interleaved, made_from
from benchmarks.paper.setup import NAMES, Setup

NAME = "table"
SIZE = 16


def measure(setup: Setup) -> None:
    """One part: the figures of `firp bench`, all prompts and by category."""
    document = setup.document(
        NAME, nodes=SIZE, repeats=setup.repeats, tau=TAU_FORMULA, tree="dynamic, N nodes with the root, P = N",
        device=setup.model.device.type, threads=torch.get_num_threads(),
    )  # fmt: skip

    def compute() -> dict:
        tree, k = firp.TreeConfig(SIZE, SIZE), setup.num_offsets
        methods = drafting_methods(setup.model, setup.predictor, tree, k, setup.heads, SIZE)
        return interleaved(
            methods, setup.chosen_prompts, setup.model, setup.tokenizer, setup.max_new_tokens, setup.repeats
        )

    document.part("categories", made_from(setup.predictor, setup.heads), compute)


def draw(document: dict, pyplot: Any) -> Any:
    figures = document["parts"]["categories"]["figures"]
    rows = {name: part["methods"] for name, part in figures["categories"].items()} | {"all": figures["methods"]}
    names = [name for name in figures["methods"] if name != "ar"]
    cells = [
        [f"{cut(row[name]['tau'])}, {cut(row[name]['speedup_vs_ar']['median'])}x" for name in names]
        for row in rows.values()
    ]
    drawn, axes = pyplot.subplots(figsize=(2 + 2 * len(names), 0.5 + 0.35 * len(rows)))
    axes.axis("off")
    axes.table(cells, rowLabels=list(rows), colLabels=[f"{NAMES[name]}: tau, speedup" for name in names], loc="center")
    drawn.tight_layout()
    return drawn


if __name__ == "__main__":
    from benchmarks.paper.alone import alone

    alone(NAME)
