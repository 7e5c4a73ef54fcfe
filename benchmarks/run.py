"""Microbenchmarks of the ops: `python benchmarks/run.py --help`.

Each op is checked against its reference, then timed beside what a user would write instead (docs/benchmarks.md).
Exit code: 0, 1 where a check failed, 2 for a bad argument.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.measure import broken, run_case, withhold
from benchmarks.report import environment, plot, print_table, write_json
from benchmarks.shapes import DEFAULT_SHAPES, DEVICES, SHAPES, grids
from benchmarks.timing import Rates
from firp_kernels import ops, registry

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
OPS = {name: importlib.import_module(f"benchmarks.{name}") for name in ops.SCHEMAS}


def chosen(option: str, text: str | None, allowed, default) -> tuple[str, ...]:
    """The names in a comma-separated option; ValueError names the option for one that is unknown."""
    if text is None:
        return tuple(default)
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in allowed:
            raise ValueError(f"{option}: got {name!r}, expected one of {', '.join(allowed)}")
    return names


def choose_device(device: str | None) -> str:
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device not in DEVICES:
        raise ValueError(f"device: got {device!r}, expected one of {', '.join(DEVICES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: got 'cuda', but torch sees no CUDA device here")
    return device


def benchmark(
    names: tuple[str, ...], device: str, shapes: tuple[str, ...], impls: tuple[str, ...] | None, repeats: int,
    check_only: bool, console: Console, json_path: Path | None,
) -> tuple[dict, list[str]]:  # fmt: skip
    """Run ops over shapes, print a table per op; the JSON document, and the ops of which a check failed."""
    rates = None if check_only else Rates(device)
    settings = {"device": device, "ops": names, "shapes": shapes, "repeats": repeats, "checked_only": check_only}
    document = {"environment": environment(device), "settings": settings, "rates": {}, "entries": []}
    failed = []
    for name in names:
        grid_list = [grid for shape in shapes for grid in grids(SHAPES[shape], device)]
        # An op whose inputs have one dtype makes the same cases for every dtype of the grid.
        cases = {case.label: case for grid in grid_list for case in OPS[name].cases(grid)}.values()
        before, entries = document["entries"], []
        for case in track(cases, name, console=Console(stderr=True), transient=True):
            entries += run_case(case, impls, device, repeats, rates)
            if broken(entries) and not check_only:
                withhold(entries)
            # After every case, so that a run that is stopped keeps what it has.
            document |= {"entries": before + entries, "rates": {} if rates is None else rates.document()}
            if json_path is not None:
                write_json(document, json_path)
        if broken(entries):
            failed.append(name)
        if entries:
            print_table(entries, console)
        else:
            console.print(f"{name}: only the reference runs it")
    return document, failed


@app.command()
def main(
    op: Annotated[str | None, typer.Option(help="Comma-separated ops; default: all.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; default: cuda where there is one.")] = None,
    shapes: Annotated[str | None, typer.Option(help=f"Comma-separated: {', '.join(SHAPES)}.")] = None,
    impl: Annotated[
        str | None, typer.Option(help="Comma-separated; default: the device's owner, and the reference.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Interleaved repeats.")] = 21,
    check_only: Annotated[
        bool, typer.Option("--check-only", help="Check against the reference, time nothing.")
    ] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Where to write the figures.")] = None,
    plot_path: Annotated[Path | None, typer.Option("--plot", help="Where to draw them.")] = None,
) -> None:
    """Check every op against its reference, then time it beside the alternatives and the machine's floor."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    try:
        where = choose_device(device)
        names = chosen("op", op, OPS, OPS)
        shape_names = chosen("shapes", shapes, SHAPES, DEFAULT_SHAPES[where])
        impls = None if impl is None else chosen("impl", impl, registry.IMPLEMENTATIONS, ())
        if repeats < 1:
            raise ValueError(f"repeats: got {repeats}, expected at least 1")
        if check_only and plot_path is not None:
            raise ValueError("plot: nothing is timed with --check-only")
        document, failed = benchmark(names, where, shape_names, impls, repeats, check_only, console, json_path)
        about = document["environment"]
        title = f"{about['device']}, {about['threads']} threads, torch {about['torch']}"
        console.print(f"{title}{'' if check_only else ', ' + _rates_line(document['rates'])}", soft_wrap=True)
        if plot_path is not None and any("microseconds" in entry for entry in document["entries"]):
            plot(document["entries"], title, plot_path)
    except ValueError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"error: {error}", markup=False)
        raise typer.Exit(2) from None
    if failed:
        consequence = "" if check_only else ": no times and no speedups are reported for it"
        console.print(f"a check of {', '.join(failed)} failed{consequence}", soft_wrap=True)
        raise typer.Exit(1)


def _rates_line(rates: dict) -> str:
    products = (f"{name} {rate / 1e12:.3g} Top/s" for name, rate in rates["matmul_operations_per_second"].items())
    return ", ".join([f"copy {rates['copy_bytes_per_second'] / 1e9:.3g} GB/s", *products])


if __name__ == "__main__":
    app()
