"""A bench as a table in the terminal and as a picture."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from firp.tools.figures import cut


def _ratio(spread: dict | None) -> str:
    return "-" if spread is None else f"{cut(spread['median'])}x ({cut(spread['min'])}-{cut(spread['max'])})"


def print_table(document: dict, console: Console | None = None) -> None:
    """Methods over all prompts, then tau and speedup per category; a suite has a table of its own for these."""
    console = console or Console(highlight=False)
    environment = document["environment"]
    title = f"{environment['device']}, {environment['threads']} threads, {environment['dtype']}"
    table = Table("method", "tokens", "tau", "tokens/s", "vs ar", "vs hf", "identical to hf", title=title)
    for name, entry in document["methods"].items():
        identical = entry.get("identical_to_hf")
        table.add_row(
            name,
            str(entry["tokens"]),
            cut(entry["tau"], 3),
            cut(entry["tokens_per_second"]["median"], 1),
            _ratio(entry.get("speedup_vs_ar")),
            _ratio(entry.get("speedup_vs_hf")),
            "-" if identical is None else f"{identical['identical']}/{identical['total']}",
        )
    console.print(table)
    if len(document["categories"]) > 1 and "suite" not in document:
        names = list(document["methods"])
        table = Table("category", *(f"{name} tau" for name in names), *(f"{name} vs ar" for name in names))
        for category, part in document["categories"].items():
            entries = [part["methods"][name] for name in names]
            table.add_row(
                category,
                *(cut(entry["tau"]) for entry in entries),
                *("-" if "speedup_vs_ar" not in e else f"{cut(e['speedup_vs_ar']['median'])}x" for e in entries),
            )
        console.print(table)
    console.print(f"tau = {document['tau']}; ratios: median (min-max) over interleaved repeats")


def plot(document: dict, path: Path) -> None:
    """Tokens per second of every method, with the spread over repeats.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise ValueError("plot: matplotlib is not installed, run: pip install matplotlib") from error
    names = list(document["methods"])
    speeds = [document["methods"][name]["tokens_per_second"] for name in names]
    below = [speed["median"] - speed["min"] for speed in speeds]
    above = [speed["max"] - speed["median"] for speed in speeds]
    figure, axes = pyplot.subplots(figsize=(1.6 * len(names) + 2, 4))
    bars = axes.bar(names, [speed["median"] for speed in speeds], yerr=[below, above], capsize=4)
    axes.bar_label(bars, [f"tau {cut(document['methods'][name]['tau'])}" for name in names], padding=4)
    axes.set_ylabel("tokens per second")
    axes.set_title(f"{document['environment']['device']}, {document['environment']['dtype']}")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
