"""`keep_top_p`: nucleus sampling over the node rows of a step, against Hugging Face's sort."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.case import Alternative, Case, normal
from benchmarks.shapes import DTYPES, Grid, Tree

TOP_P = 0.9


def cases(grid: Grid) -> Iterator[Case]:
    vocabulary = grid.shape.vocabulary
    # Processed scores are float32 for every dtype of the model.
    for tree in grid.trees if grid.dtype == DTYPES[grid.device][0] else ():

        def make(seed: int, tree: Tree = tree) -> tuple:
            return normal(grid.device, torch.float32, seed)(tree.num_nodes, vocabulary) * 4, TOP_P, 1, float("-inf")

        yield Case(
            "keep_top_p", "", grid.shape.name, tree, None, torch.float32, make,
            num_bytes=2 * tree.num_nodes * vocabulary * 4,
            bound=2.0**-9,
            outcome=_number_kept,
            alternatives={"sort, cumsum": Alternative(_sorted, _number_kept)},
        )  # fmt: skip


def _number_kept(_args: tuple, returned: Tensor) -> tuple[Tensor]:
    return (returned.isfinite().sum(-1).float(),)


def _sorted(args: tuple) -> Callable[[], Tensor]:
    scores, top_p, least, filter_value = args

    def call() -> Tensor:
        ascending, tokens = torch.sort(scores)
        left_out = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        left_out[:, -least:] = False
        return scores.masked_fill(left_out.scatter(1, tokens, left_out), filter_value)

    return call
