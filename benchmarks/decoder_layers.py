"""`decoder_layers`: two layers of a model, against the three calls of each."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import firp_kernels
from benchmarks.case import BOUNDS, Alternative, Case, drafted, integers, normal, num_bytes
from benchmarks.shapes import Grid, Tree
from firp_kernels.ops.decoder_layers import composed
from firp_kernels.ops.tree_attention import tree_mask

LAYERS = 2


def cases(grid: Grid) -> Iterator[Case]:
    for tree in grid.trees:
        yield _case(grid, tree, grid.contexts[0])


def _case(grid: Grid, tree: Tree, context: int) -> Case:
    shape, rows = grid.shape, tree.rows
    heads, kv_heads = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim

    def make(seed: int) -> tuple:
        random = normal(grid.device, grid.dtype, seed)

        def weights(*outputs_and_inputs: tuple[int, int]) -> list:
            return [random(*size).mul_(size[1] ** -0.5) for _ in range(LAYERS) for size in outputs_and_inputs]

        wide, angles = (shape.mlp_width, shape.width), random(1, rows, shape.head_dim)
        _, _, depths, ancestors, lookahead = drafted(tree, shape.vocabulary, grid.device, seed)
        return (
            random(1, rows, shape.width), angles.cos(), angles.sin(), 1e-5,
            [random(shape.width) for _ in range(2 * LAYERS)],
            weights((heads, shape.width), (kv_heads, shape.width), (kv_heads, shape.width)), [],
            weights((shape.width, heads)), [], weights(wide, wide, wide[::-1]),
            random(LAYERS, 2, 1, context + rows, shape.kv_heads, shape.head_dim), integers(grid.device, context),
            depths, ancestors, lookahead, tree.num_offsets, shape.head_dim**-0.5, None,
        )  # fmt: skip

    sample = make(0)
    streamed = [*sample[5], *sample[7], *sample[9]]
    visible = int(tree_mask(*sample[11:16], rows).sum())
    return Case(
        "decoder_layers", "", shape.name, tree, context, grid.dtype, make,
        num_bytes=num_bytes(*streamed, *sample[4], sample[0], sample[0], sample[10]),
        operations=2 * rows * sum(weight.numel() for weight in streamed) + 4 * LAYERS * visible * heads,
        bound=BOUNDS[grid.dtype],
        outcome=lambda args, returned: (returned, args[10]),
        alternatives={
            "three calls a layer": Alternative(
                lambda args: functools.partial(composed, firp_kernels, *args), lambda args, out: (out, args[10])
            ),
        },
    )  # fmt: skip
