"""`emit_tokens`: from a verified path to tokens, flags and the packed record, against the same in torch."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from benchmarks.case import Alternative, Case, drafted, integers, num_bytes
from benchmarks.shapes import Grid, Tree
from firp_kernels.ops import emit_tokens

STOP_TOKENS = (-1, -2)
REMAINING = 1000


def cases(grid: Grid) -> Iterator[Case]:
    for tree in grid.trees:

        def make(seed: int, tree: Tree = tree) -> tuple:
            tokens = drafted(tree, grid.shape.vocabulary, grid.device, seed)[0]
            accepted = min(1, tree.num_nodes - 1)
            path = [*range(accepted + 1), *[-1] * (tree.num_offsets - accepted)]
            context, zero, count = (integers(grid.device, value) for value in (grid.contexts[0], 0, accepted))
            bonus, remaining = zero.long() + 5, zero.long() + REMAINING
            stop_tokens, finished = torch.tensor(STOP_TOKENS, device=grid.device), zero.bool()
            verified = integers(grid.device, *path)[None], count, bonus, zero, zero.clone(), zero.clone()
            sizes = tree.num_offsets, grid.shape.vocabulary, 2 * grid.contexts[0]
            return *verified, tokens, stop_tokens, context, finished, remaining, *sizes

        sample = make(0)
        moved = num_bytes(*sample[:11], *emit_tokens.reference(*sample))
        yield Case(
            "emit_tokens", "", grid.shape.name, tree, None, torch.int64, make, moved,
            alternatives={"torch": Alternative(lambda args: functools.partial(emit_tokens.reference, *args))},
            reset=lambda args: args[10].fill_(REMAINING),
        )  # fmt: skip
