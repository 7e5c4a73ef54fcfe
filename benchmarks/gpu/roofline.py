"""What a decode step takes at least, computed from bytes, operations and launches: not measured.

    python -m benchmarks.gpu.roofline        # the tables of docs/roofline.md

A product takes as long as its weights are read or its operations are done, whichever is longer, and `RAMP` to fill and
drain the machine. Any other kernel takes `LAUNCH`, and what it reads of keys and values. Parts are added up: kernels of
a graph follow each other.
"""

from __future__ import annotations

import json
from dataclasses import astuple, dataclass
from pathlib import Path

from benchmarks.shapes import PLAIN, SHAPES, Shape, Tree

RESULTS = Path(__file__).resolve().parents[1] / "results/h200-2026-11-26.json"
# Of bfloat16.
ELEMENT = 2
# Seconds, assumed: from one small kernel of a graph to the next; what a product loses at its start and its end.
LAUNCH, RAMP = 2e-6, 2e-6
# Joint queries, keys and values; output; joint gate and up; down.
PRODUCTS = 4
# Two norms, each with its sum before it; the gate; rotary with the cache write.
SMALL_KERNELS = 4
# Kernels beside the layers, without the products of head and predictor: plain, one pass of the head, two.
BESIDE = (9, 12, 16)
# Rows up to which the head is passed once (firp.engine.rows).
SHARED_ROWS = 192
CONTEXTS = (1024, 4096)
FIRP = Tree(16, 16, 3)
MODELS = ("llama2-7b", "llama2-13b", "llama3-8b", "smollm2-135m")


@dataclass(frozen=True)
class Gpu:
    """Bytes a second of a large copy, operations a second of a dense bfloat16 product."""

    name: str
    bandwidth: float
    operations: float


# Bandwidth of the H200 is measured; that of the H100 is the same share, 87 %, of its datasheet's 3.35 TB/s. Operations
# are the datasheet's, without sparsity.
GPUS = (Gpu("H100", 2.93e12, 989e12), Gpu("H200", 4.195e12, 989e12))


@dataclass(frozen=True)
class StepParts:
    """Seconds of a step's parts.

    Attributes:
        weights: products of all layers.
        attention: keys and values of all layers, and the launches for them.
        head: the head's product over node rows, or over all rows.
        glue: small kernels, in the layers and beside them.
        projection: the predictor's product.
        second_pass: the head once more, over the pseudo rows of one node.
    """

    weights: float
    attention: float
    head: float
    glue: float
    projection: float
    second_pass: float

    @property
    def total(self) -> float:
        return sum(astuple(self))


def layer_weights(shape: Shape) -> int:
    """Numbers in one layer's linears."""
    attention = shape.width * shape.head_dim * 2 * (shape.heads + shape.kv_heads)
    return attention + 3 * shape.width * shape.mlp_width


def product_seconds(gpu: Gpu, numbers: int, rows: int, products: int = 1) -> float:
    """Of `products` linears with `numbers` weights in all over some rows."""
    return max(numbers * ELEMENT / gpu.bandwidth, 2 * rows * numbers / gpu.operations) + products * RAMP


def attention_seconds(gpu: Gpu, shape: Shape, context: int, rows: int) -> float:
    """Of one layer, in one launch."""
    seen = context + rows
    read = 2 * seen * shape.kv_heads * shape.head_dim * ELEMENT / gpu.bandwidth
    return max(read, 4 * rows * seen * shape.heads * shape.head_dim / gpu.operations) + LAUNCH


def insertion_layer(shape: Shape) -> int:
    """Where the shipped predictor and `firp bench --random-weights` insert pseudo rows: two thirds up."""
    return shape.layers * 2 // 3


def step_parts(gpu: Gpu, shape: Shape, tree: Tree, context: int) -> StepParts:
    """Seconds of a step of one sequence; a tree without lookahead nodes decodes plainly."""
    drafts = tree.num_lookahead > 0
    below = insertion_layer(shape) if drafts else 0
    rows = [tree.num_nodes] * below + [tree.rows] * (shape.layers - below)
    one_pass = tree.rows <= SHARED_ROWS
    head = shape.vocabulary * shape.width
    beside = BESIDE[0] if not drafts else BESIDE[1] if one_pass else BESIDE[2]
    maps = tree.num_offsets * shape.width**2
    return StepParts(
        weights=sum(product_seconds(gpu, layer_weights(shape), count, PRODUCTS) for count in rows),
        attention=sum(attention_seconds(gpu, shape, context, count) for count in rows),
        head=product_seconds(gpu, head, tree.rows if one_pass else tree.num_nodes),
        glue=(SMALL_KERNELS * shape.layers + beside) * LAUNCH,
        projection=product_seconds(gpu, maps, tree.num_lookahead) if drafts else 0.0,
        second_pass=product_seconds(gpu, head, tree.num_offsets) if drafts and not one_pass else 0.0,
    )


def least_bytes(shape: Shape, tree: Tree, context: int) -> int:
    """What a step reads once: layers, head, predictor, keys and values of the context."""
    weights = shape.layers * layer_weights(shape) + shape.vocabulary * shape.width
    weights += tree.num_offsets * shape.width**2 if tree.num_lookahead else 0
    return ELEMENT * (weights + 2 * shape.layers * context * shape.kv_heads * shape.head_dim)


def computed(document: dict, entry: dict) -> StepParts | None:
    """For an entry of `firp bench --random-weights`, at the bandwidth that it measured; None for another device."""
    shape = SHAPES.get(document["random_weights"])
    known = next((gpu for gpu in GPUS if gpu.name in str(document["environment"]["device"])), None)
    if shape is None or known is None:
        return None
    gpu = Gpu(known.name, document["copy_bandwidth_bytes_per_second"], known.operations)
    offsets = document["settings"]["num_offsets"]
    return step_parts(gpu, shape, Tree(entry["num_nodes"], entry["num_lookahead"], offsets), entry["context"])


def table(gpu: Gpu) -> str:
    """Markdown: milliseconds of each part, for plain decoding and FIRP."""
    lines = [
        "| model | context | step | weights | attention | head | glue | projection | total | of bandwidth | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in MODELS:
        for context in CONTEXTS:
            plain = step_parts(gpu, SHAPES[name], PLAIN, context).total
            for label, tree in (("plain", PLAIN), ("FIRP", FIRP)):
                parts = step_parts(gpu, SHAPES[name], tree, context)
                share = least_bytes(SHAPES[name], tree, context) / gpu.bandwidth / parts.total
                shown = (parts.weights, parts.attention, parts.head, parts.glue, parts.projection, parts.total)
                cells = [name, str(context), label, *(f"{1e3 * seconds:.3f}" for seconds in shown), f"{share:.0%}"]
                cells.append(f"{parts.total / plain:.3f}x" if label == "FIRP" else "")
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def comparison(document: dict) -> str:
    """Markdown: the steps of a measured document beside what is computed for them."""
    lines = ["| N | P | rows | computed, ms | measured, ms | computed ratio | measured ratio |"]
    lines.append("|---|---|---|---|---|---|---|")
    plain = None
    for entry in document["steps"]:
        parts = computed(document, entry)
        if parts is None:
            raise ValueError(f"device: got {document['environment']['device']!r}, expected one of the GPUs known here")
        plain = plain or parts.total
        lines.append(
            f"| {entry['num_nodes']} | {entry['num_lookahead']} | {entry['rows']} | {1e3 * parts.total:.2f} "
            f"| {entry['step_ms']['median']:.2f} | {parts.total / plain:.3f}x "
            f"| {entry['break_even_tau']['median']:.3f}x |"
        )
    return "\n".join(lines)


def measured() -> dict:
    """The step cost measured on an H200: Llama-3-8B's shape at a context of 1024."""
    return json.loads(RESULTS.read_text())["step_cost"]


if __name__ == "__main__":
    for each in GPUS:
        print(f"### {each.name}: computed\n\n{table(each)}\n")
    print(comparison(measured()))
