"""Check this tree on a machine with a GPU: build, smoke, tests, step cost, microbenchmarks, end to end, sanitizer.

Every stage runs in its own process with a time limit, and a failing stage does not stop the next. The current Python
is used as it is: nothing is downloaded, and the package need not be installed. Exit code: 0, 1 where a stage failed or
was skipped, 2 for a bad argument or without a GPU.
"""

from __future__ import annotations

import datetime
import importlib
import platform
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.gpu.runner import PARTS, ROOT, commit, run_stages, source_hash
from benchmarks.gpu.stages import stages

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def environment() -> dict:
    """What the figures are measured on."""
    versions = {name: importlib.import_module(name).__version__ for name in ("torch", "triton", "transformers")}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "gpu": gpu,
        "commit": commit(), "sources": source_hash(), "python": platform.python_version(), "cuda": torch.version.cuda,
    } | versions  # fmt: skip


@app.command()
def main(
    stage: Annotated[str, typer.Option(help="all, or some of the stages, comma-separated.")] = "all",
    out: Annotated[
        Path | None, typer.Option(help="Folder of JSON and log; default: benchmarks/results/gpu, or gpu-dry-run.")
    ] = None,
    model: Annotated[
        str, typer.Option(help="Model of the end-to-end bench: a folder, or smollm2-135m.")
    ] = "smollm2-135m",
    predictor: Annotated[
        str | None, typer.Option(help="Its predictor; default: the one shipped for the model.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="For all stages together.")] = float("inf"),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Rehearse on a CPU: tiny shapes, reference ops, nothing built.")
    ] = False,
) -> None:
    """Run the stages in the order of their value; one that passed before on the same code runs again only if named."""
    if not dry_run and not torch.cuda.is_available():
        _refuse("gpu-check needs a GPU: torch sees no CUDA device here")
    if not seconds > 0:
        _refuse(f"seconds: got {seconds:g}, expected more than 0")
    out = (out or ROOT / "benchmarks/results" / ("gpu-dry-run" if dry_run else "gpu")).resolve()
    known = {one.name: one for one in stages(out / PARTS, model, predictor, dry_run)}
    names = list(known) if stage == "all" else [name.strip() for name in stage.split(",")]
    for name in names:
        if name not in known:
            _refuse(f"stage: got {name!r}, expected all or some of {', '.join(known)}")
    chosen = [one for name, one in known.items() if name in names]
    if not run_stages(chosen, out, environment(), seconds, again=stage != "all"):
        raise typer.Exit(1)


def _refuse(message: str) -> None:
    print(message, file=sys.stderr)
    raise typer.Exit(2)


if __name__ == "__main__":
    app()
