"""What a plain step and a FIRP step cost at a model's shape, with random weights: no acceptance, no meaningful text."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import LlamaForCausalLM

from firp.bench.random_weights import build, cache_bytes
from firp.drafting.predictor import FirpPredictor
from firp.drafting.trees import TreeConfig
from firp.engine.engine import Engine
from firp.tools.environment import environment
from firp.tools.hardware import copy_bandwidth
from firp.tools.models import parse_dtype
from firp.tune.choose import Candidate, plain
from firp.tune.cost import StepTime, measure_steps, num_steps

NOTE = "random weights: only the cost of a step is meant"
BREAK_EVEN = "tau at which FIRP breaks even = FIRP step time / plain step time"
SHARE = (
    "bytes that a step must read once (layers, final norm, head, predictor; keys and values of the context) / "
    "step time / bandwidth of a large copy"
)
SIZES = ((4, 2), (8, 4), (16, 4), (16, 16), (32, 8), (32, 32), (64, 16))
CONTEXTS = (1024, 4096)
STEPS, REPEATS = 16, 3


def _bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def step_bytes(model: LlamaForCausalLM, predictor: FirpPredictor | None, context: int, batch_size: int = 1) -> int:
    """Bytes that one step has to read: every weight once, and keys and values of each sequence's context."""
    weights = _bytes(model.model.layers) + _bytes(model.model.norm) + _bytes(model.get_output_embeddings())
    drafting = 0 if predictor is None else _bytes(predictor)
    return weights + drafting + batch_size * cache_bytes(model.config, context, model.dtype)


def _entry(candidate: Candidate, time: StepTime, base: StepTime, read: int, bandwidth: float) -> dict:
    return {
        "method": "plain" if candidate.num_nodes == 1 else "firp",
        "num_nodes": candidate.num_nodes,
        "num_lookahead": 0 if candidate.num_nodes == 1 else candidate.num_lookahead,
        "rows": candidate.rows,
        "step_ms": {"median": 1e3 * time.seconds, "min": 1e3 * min(time.repeats), "max": 1e3 * max(time.repeats)},
        "break_even_tau": dict(zip(("median", "min", "max"), time.relative_to(base), strict=True)),
        "bytes": read,
        "bandwidth_share": read / time.seconds / bandwidth,
    }


def measure_step_cost(
    shape: str,
    dtype: str,
    device: str,
    contexts: Sequence[int] = CONTEXTS,
    sizes: Sequence[tuple[int, int]] = SIZES,
    num_offsets: int = 3,
    steps: int = STEPS,
    repeats: int = REPEATS,
) -> dict:
    """The JSON document of `firp bench --random-weights`.

    Args:
        shape: a key of `random_weights.SHAPES`.
        contexts: tokens before a measured step.
        sizes: (N, P) of the trees, next to plain decoding.
        num_offsets: k.

    Raises:
        ValueError: an unknown shape or dtype, a tree out of range, a context past the model's, too little memory.
    """
    found = [plain(num_offsets), *(Candidate(n, p, num_offsets) for n, p in sizes)]
    trees = {candidate: TreeConfig(candidate.num_nodes, candidate.num_lookahead) for candidate in found}
    room = num_steps(steps, repeats) * (num_offsets + 1)
    held = sum(max(contexts) + room + candidate.rows for candidate in found)
    model, predictor = build(shape, parse_dtype(dtype), device, num_offsets, held)
    bandwidth = copy_bandwidth(device)
    engines = {c: Engine(model) if c.num_nodes == 1 else Engine(model, predictor, tree) for c, tree in trees.items()}
    entries = []
    for context in contexts:
        times = measure_steps(engines, context, 1, steps, repeats)
        for candidate, time in times.items():
            read = step_bytes(model, None if candidate.num_nodes == 1 else predictor, context)
            entries.append({"context": context} | _entry(candidate, time, times[found[0]], read, bandwidth))
    return {
        "random_weights": shape,
        "note": NOTE,
        "environment": environment(model),
        "settings": {
            "num_offsets": num_offsets, "insertion_layer": predictor.insertion_layer,
            "num_layers": predictor.num_layers,
            "steps": steps, "repeats": repeats, "batch_size": 1, "weight_bytes": _bytes(model),
        },
        "copy_bandwidth_bytes_per_second": bandwidth,
        "bandwidth_share": SHARE,
        "break_even_tau": BREAK_EVEN,
        "steps": entries,
    }  # fmt: skip


def print_step_cost(document: dict, console: Console | None = None) -> None:
    """One table per context."""
    console = console or Console(highlight=False, soft_wrap=True)
    machine, settings = document["environment"], document["settings"]
    name = f"{document['random_weights']} (random weights), {machine['device']}, {machine['dtype']}"
    for context in sorted({entry["context"] for entry in document["steps"]}):
        place = f"t {settings['insertion_layer']} of {settings['num_layers']}"
        title = f"{name}, context {context}, k {settings['num_offsets']}, {place}"
        table = Table(
            "method", "N", "P", "rows", "step ms (min-max)", "bandwidth share", "breaks even at tau", title=title
        )
        for entry in document["steps"]:
            if entry["context"] != context:
                continue
            time, tau = entry["step_ms"], entry["break_even_tau"]
            table.add_row(
                entry["method"], str(entry["num_nodes"]), str(entry["num_lookahead"]), str(entry["rows"]),
                f"{time['median']:.3f} ({time['min']:.3f}-{time['max']:.3f})",
                f"{100 * entry['bandwidth_share']:.0f} %",
                f"{tau['median']:.3f} ({tau['min']:.3f}-{tau['max']:.3f})",
            )  # fmt: skip
        console.print(table)
    console.print(f"copy bandwidth {document['copy_bandwidth_bytes_per_second'] / 1e9:.0f} GB/s; {document['note']}")
    console.print(f"share = {document['bandwidth_share']}; {document['break_even_tau']}")
