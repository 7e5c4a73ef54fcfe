"""`predictor_projection`: pseudo rows at the insertion layer, against torch's index, product and concatenation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import linear

from benchmarks.case import BOUNDS, Alternative, Case, drafted, normal
from benchmarks.shapes import Grid, Tree


def cases(grid: Grid) -> Iterator[Case]:
    shape, device = grid.shape, grid.device
    for tree in grid.trees:
        if not tree.num_lookahead:
            tree = Tree(1, 1, tree.num_offsets)

        def make(seed: int, tree: Tree = tree) -> tuple:
            random = normal(device, grid.dtype, seed)
            weight = random(tree.num_offsets, shape.width, shape.width).mul_(shape.width**-0.5)
            return random(1, tree.num_nodes, shape.width), weight, drafted(tree, shape.vocabulary, device, seed)[-1]

        floats = tree.num_offsets * shape.width**2 + (tree.num_nodes + tree.rows) * shape.width
        yield Case(
            "predictor_projection", "", shape.name, tree, None, grid.dtype, make,
            num_bytes=floats * grid.dtype.itemsize,
            operations=2 * tree.num_lookahead * tree.num_offsets * shape.width**2,
            bound=BOUNDS[grid.dtype],
            alternatives={"index + einsum + cat": Alternative(_einsum), "index + linear + cat": Alternative(_linear)},
        )  # fmt: skip


def _einsum(args: tuple):
    hidden, weight, lookahead = args
    nodes = lookahead[0].long()

    def call():
        pseudo = torch.einsum("kod,bpd->bpko", weight, hidden[:, nodes])
        return torch.cat([hidden, pseudo.flatten(1, 2)], 1)

    return call


def _linear(args: tuple):
    hidden, weight, lookahead = args
    nodes, joined = lookahead[0].long(), weight.flatten(0, 1)

    def call():
        pseudo = linear(hidden[:, nodes], joined)
        return torch.cat([hidden, pseudo.view(hidden.shape[0], -1, hidden.shape[-1])], 1)

    return call
