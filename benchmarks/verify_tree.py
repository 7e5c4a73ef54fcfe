"""`verify_tree`: choice and walk, against torch's argmax or multinomial with a walk on the host, and torch.amax."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.case import Alternative, Case, drafted, normal, num_bytes
from benchmarks.shapes import Grid, Tree

MANY_NODES = Tree(64, 16, 3)


def cases(grid: Grid) -> Iterator[Case]:
    trees = (*grid.trees, MANY_NODES) if grid.device == "cuda" and grid.shape.name != "tiny" else grid.trees
    for tree in {tree.num_nodes: tree for tree in trees}.values():
        for samples in (False, True):
            yield _case(grid, tree, samples)


def _case(grid: Grid, tree: Tree, samples: bool) -> Case:
    shape, device = grid.shape, grid.device

    def make(seed: int) -> tuple:
        tokens, parents, _, _, lookahead = drafted(tree, shape.vocabulary, device, seed)
        scores = normal(device, torch.float32, seed)(1, tree.num_nodes, shape.vocabulary)
        # The walk follows first children to the bottom: each parent's score of its first child's token is the largest.
        for child in range(tree.num_nodes - 1, 0, -1):
            parent = int(parents[0, child])
            scores[0, parent] = scores[0, parent].clamp(max=5)
            scores[0, parent, tokens[0, child]] = 40
        uniforms = None
        if samples:
            scores = scores.softmax(-1)
            uniforms = torch.full((1, tree.num_offsets + 1), 0.5, device=device)
        return scores if samples else scores.to(grid.dtype), uniforms, tokens, parents, lookahead, tree.num_offsets

    sample = make(0)
    visited, _ = walk(*(part[0].tolist() for part in (sample[0].argmax(-1), sample[2], sample[3])))
    row = num_bytes(sample[0]) // tree.num_nodes
    name, choose = ("multinomial", _multinomial) if samples else ("argmax", _argmax)
    return Case(
        "verify_tree", "sampling" if samples else "greedy", shape.name, tree, None, sample[0].dtype, make,
        num_bytes=len(visited) * row + num_bytes(*sample[1:5]),
        alternatives={
            f"{name} + host walk": Alternative(
                functools.partial(_host_walk, choose), None if samples else (lambda _, out: out), capturable=False
            ),
            "torch.amax": Alternative(lambda args: functools.partial(torch.amax, args[0], -1), None, floor=True),
        },
    )  # fmt: skip


def walk(choices: list[int], tokens: list[int], parents: list[int]) -> tuple[list[int], int]:
    """Accepted nodes from the root, and the bonus token."""
    path = [0]
    while True:
        node = path[-1]
        child = next(
            (c for c in range(node + 1, len(tokens)) if parents[c] == node and tokens[c] == choices[node]), None
        )
        if child is None:
            return path, choices[node]
        path.append(child)


def _argmax(scores: Tensor) -> Tensor:
    return scores.argmax(-1)


def _multinomial(scores: Tensor) -> Tensor:
    return torch.multinomial(scores[0], 1).view(1, -1)


def _host_walk(choose, args: tuple):
    scores, _, tokens, parents, _, max_depth = args

    def call() -> tuple[Tensor, Tensor, Tensor]:
        choices = choose(scores)[0].tolist()
        path, bonus = walk(choices, tokens[0].tolist(), parents[0].tolist())
        padded = path + [-1] * (max_depth + 1 - len(path))
        options = {"dtype": torch.int32, "device": scores.device}
        accepted = torch.tensor([len(path) - 1], **options)
        return torch.tensor([padded], **options), accepted, torch.tensor([bonus], device=scores.device)

    return call
