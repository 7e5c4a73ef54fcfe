"""What is measured: model shapes, draft trees, contexts and dtypes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

DEVICES = ("cuda", "cpu")


@dataclass(frozen=True)
class Shape:
    """Sizes of one model: layers, width d, query and key/value heads, head_dim D, MLP width, vocabulary V."""

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    vocabulary: int


@dataclass(frozen=True)
class Tree:
    """N nodes with the root, P lookahead nodes, k offsets; N = 1, P = 0 is plain decoding."""

    num_nodes: int
    num_lookahead: int
    num_offsets: int

    @property
    def rows(self) -> int:
        return self.num_nodes + self.num_lookahead * self.num_offsets


@dataclass(frozen=True)
class Grid:
    """What an op's `cases` runs through: one shape and dtype on one device, over trees and contexts."""

    shape: Shape
    dtype: torch.dtype
    device: str
    trees: tuple[Tree, ...]
    contexts: tuple[int, ...]


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama2-7b", 32, 4096, 32, 32, 128, 11008, 32000),
        Shape("llama2-13b", 40, 5120, 40, 40, 128, 13824, 32000),
        Shape("llama3-8b", 32, 4096, 32, 8, 128, 14336, 128256),
        Shape("smollm2-135m", 30, 576, 9, 3, 64, 1536, 49152),
        Shape("tiny", 2, 256, 4, 2, 64, 384, 997),
    )
}
DEFAULT_SHAPES = {"cuda": ("llama2-7b", "llama2-13b", "llama3-8b", "smollm2-135m"), "cpu": ("smollm2-135m",)}
PLAIN = Tree(1, 0, 3)
TREES = {"cuda": (PLAIN, Tree(16, 16, 3), Tree(32, 32, 3)), "cpu": (PLAIN, Tree(8, 2, 3), Tree(8, 8, 3))}
CONTEXTS = {"cuda": (1024, 4096), "cpu": (512, 4096)}
DTYPES = {"cuda": (torch.bfloat16,), "cpu": (torch.float32, torch.bfloat16)}
TINY_TREES = (PLAIN, Tree(8, 2, 3))
TINY_CONTEXTS = (40,)


def grids(shape: Shape, device: str) -> list[Grid]:
    """One grid per dtype; the shape "tiny" comes with tiny trees and contexts."""
    tiny = shape.name == "tiny"
    trees = TINY_TREES if tiny else TREES[device]
    contexts = TINY_CONTEXTS if tiny else CONTEXTS[device]
    return [Grid(shape, dtype, device, trees, contexts) for dtype in DTYPES[device]]
