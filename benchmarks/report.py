"""A run as JSON, as a table in the terminal and as a picture."""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import platform
from pathlib import Path

import torch
from firp.tools.figures import cut
from rich.console import Console
from rich.table import Table

from benchmarks.timing import cache_bytes
from firp_kernels import __version__, registry


def environment(device: str) -> dict:
    """What the figures were measured on."""
    extension, _ = registry.load_extension()
    triton = importlib.import_module("triton").__version__ if importlib.util.find_spec("triton") else None
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "cache_bytes": cache_bytes(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton,
        "firp_kernels": __version__,
        "extension": None if extension is None else extension.build_info(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def write_json(document: dict, path: Path) -> None:
    """Write the whole document or nothing; called after every case."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{os.getpid()}.{path.name}")
    staging.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(staging, path)


def fastest_alternative(entry: dict, entries: list[dict]) -> str | None:
    """Name of the fastest alternative timed beside an implementation; the reference where there is no other."""
    rivals = [e for e in entries if e["kind"] == "alternative" and "microseconds" in e and same_case(e, entry)]
    if rivals:
        return min(rivals, key=lambda e: e["microseconds"]["median"])["implementation"]
    return "reference" if "reference" in entry.get("speedup", {}) else None


def same_case(one: dict, other: dict) -> bool:
    return (one["op"], one["case"]) == (other["op"], other["case"])


def print_table(entries: list[dict], console: Console) -> None:
    """One op: a row per case and contender; the speedup is against the fastest alternative."""
    table = Table("case", "implementation", "microseconds (min-max)", "of floor", "speedup", title=entries[0]["op"])
    previous = None
    for entry in entries:
        shown = "" if previous is not None and same_case(previous, entry) else entry["case"]
        if shown and previous is not None:
            table.add_section()
        previous = entry
        taken = entry.get("microseconds")
        if taken is None:
            reason = entry.get("reason", "")
            table.add_row(
                shown, entry["implementation"], f"{entry['status']}{': ' + reason if reason else ''}", "-", "-"
            )
            continue
        rival = fastest_alternative(entry, entries) if entry["kind"] == "implementation" else None
        ratio = entry.get("speedup", {}).get(rival)
        table.add_row(
            shown,
            entry["implementation"],
            f"{taken['median']:.1f} ({taken['min']:.1f}-{taken['max']:.1f})",
            f"{entry['share_of_floor']:.0%}",
            "-" if ratio is None else f"{cut(ratio['median'])}x ({cut(ratio['min'])}-{cut(ratio['max'])}) {rival}",
        )
    console.print(table)


def plot(entries: list[dict], title: str, path: Path) -> None:
    """Microseconds of every contender, one panel per op, with the floor as a line.

    Raises:
        ValueError: matplotlib is not installed, or nothing was timed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise ValueError("plot: matplotlib is not installed, run: pip install matplotlib") from error
    timed = [entry for entry in entries if "microseconds" in entry]
    if not timed:
        raise ValueError("plot: nothing was timed")
    ops = list(dict.fromkeys(entry["op"] for entry in timed))
    counts = [sum(entry["op"] == op for entry in timed) for op in ops]
    figure, panels = pyplot.subplots(
        len(ops),
        figsize=(10, 1.2 * len(ops) + 0.22 * sum(counts)),
        squeeze=False,
        height_ratios=[c + 2 for c in counts],
        layout="constrained",
    )
    colors = {"implementation": "tab:blue", "alternative": "tab:gray", "floor": "tab:green"}
    for op, axes in zip(ops, panels[:, 0], strict=True):
        chosen = [entry for entry in timed if entry["op"] == op]
        taken = [entry["microseconds"] for entry in chosen]
        errors = [[t["median"] - t["min"] for t in taken], [t["max"] - t["median"] for t in taken]]
        names = [f"{entry['case']}: {entry['implementation']}" for entry in chosen]
        places = range(len(chosen))
        axes.barh(places, [t["median"] for t in taken], xerr=errors, color=[colors[entry["kind"]] for entry in chosen])
        axes.plot([entry["floor_microseconds"] for entry in chosen], places, "k|", markersize=10)
        axes.set_yticks(places, names, fontsize=6)
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_title(op, fontsize=9)
        axes.set_xlabel("microseconds; black mark: the floor", fontsize=7)
    figure.suptitle(title, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
