"""What `firp tune` found, as JSON, as a table and as a picture."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from firp.tools.figures import cut
from firp.tune.choose import Point
from firp.tune.tuner import Batch, Tuner


def _figures(batch: Batch, point: Point, measured: bool) -> dict:
    candidate = point.candidate
    figures = {
        "num_nodes": candidate.num_nodes,
        "num_lookahead": candidate.num_lookahead,
        "num_offsets": candidate.num_offsets,
        "tree_kind": candidate.kind,
        "rows": candidate.rows,
        "step_ms": 1e3 * point.seconds,
        "tau": point.tau,
        "tokens_per_second": point.tokens_per_second,
    }
    if measured:
        time = batch.times[candidate]
        figures["step_ms_min"], figures["step_ms_max"] = 1e3 * min(time.repeats), 1e3 * max(time.repeats)
    return figures


def document(tuner: Tuner, environment: dict, settings: dict) -> dict:
    """Everything that was measured and estimated, as a JSON document."""
    batches = {}
    for batch_size, batch in tuner.batches.items():
        chosen = _figures(batch, batch.chosen, True)
        own = batch.point(batch.own)
        batches[str(batch_size)] = {
            "chosen": chosen,
            "speedup_vs_plain": batch.chosen.tokens_per_second / batch.plain.tokens_per_second,
            "speedup_vs_own": batch.chosen.tokens_per_second / own.tokens_per_second,
            "plain": _figures(batch, batch.plain, True),
            "own": _figures(batch, own, True),
            "finalists": [_figures(batch, point, True) for point in batch.final],
            "heads_step_ms": {head or "auto": 1e3 * time.seconds for head, time in batch.heads.items()},
            "grid": [_figures(batch, point, False) for point in batch.grid],
        }
    return {
        "environment": environment,
        "settings": settings | {"context": tuner.context},
        "tokens_per_second": "batch size * tau / step seconds",
        "num_offsets": tuner.num_offsets,
        "head": tuner.head,
        "batch_sizes": batches,
    }


def _name(batch: Batch, point: Point) -> str:
    names = ["plain"] if point.candidate.num_nodes == 1 else []
    names += ["predictor's own"] if point.candidate == batch.own else []
    names += ["chosen"] if point == batch.chosen else []
    return ", ".join(names)


def print_tables(tuner: Tuner, name: str, console: Console | None = None) -> None:
    """The finalists of every batch size, and in a sentence what was chosen."""
    console = console or Console(highlight=False, soft_wrap=True)
    for batch_size, batch in tuner.batches.items():
        title = f"{name}, batch {batch_size}, context {tuner.context}"
        table = Table(
            "N", "P", "k", "kind", "rows", "step ms (min-max)", "tau", "tokens/s", "vs plain", "", title=title
        )
        for point in sorted(batch.final, key=lambda point: -point.tokens_per_second):
            candidate, time = point.candidate, batch.times[point.candidate]
            table.add_row(
                str(candidate.num_nodes), str(candidate.num_lookahead), str(candidate.num_offsets), candidate.kind,
                str(candidate.rows),
                f"{1e3 * time.seconds:.2f} ({1e3 * min(time.repeats):.2f}-{1e3 * max(time.repeats):.2f})",
                cut(point.tau, 3), cut(point.tokens_per_second, 1),
                f"{cut(point.tokens_per_second / batch.plain.tokens_per_second)}x", _name(batch, point),
            )  # fmt: skip
        console.print(table)
        console.print(f"batch {batch_size}: {verdict(batch)}")
        for head, time in batch.heads.items():
            mark = ", chosen" if head == tuner.head else ""
            console.print(f"head {head or 'by the number of rows'}: {1e3 * time.seconds:.2f} ms{mark}")
    console.print(
        "tau: replayed on the model's own answers; step ms: median (min-max), interleaved; tokens/s = B * tau / step"
    )


def verdict(batch: Batch) -> str:
    """What was chosen, and how it compares to the predictor's own tree and to plain decoding."""
    chosen, own = batch.chosen, batch.point(batch.own)
    c = chosen.candidate
    if c.num_nodes == 1:
        return "no tree pays here; plain decoding"
    text = f"(N, P) = ({c.num_nodes}, {c.num_lookahead}), k = {c.num_offsets}, {c.kind}"
    text += f": {cut(chosen.tokens_per_second / batch.plain.tokens_per_second)}x plain decoding"
    if c == batch.own:
        return f"{text}; the predictor's own tree is the best measured"
    return f"{text}, {cut(chosen.tokens_per_second / own.tokens_per_second)}x the predictor's own tree"


def plot(tuner: Tuner, name: str, path: Path) -> None:
    """Step time and tokens per second against rows, one line of pictures per batch size.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise ValueError("plot: matplotlib is not installed, run: pip install matplotlib") from error
    figure, rows = pyplot.subplots(len(tuner.batches), 2, figsize=(11, 4 * len(tuner.batches)), squeeze=False)
    for (left, right), (batch_size, batch) in zip(rows, tuner.batches.items(), strict=True):
        times = sorted(batch.times.items(), key=lambda item: item[0].rows)
        shown = left.scatter(
            [c.rows for c, _ in times],
            [1e3 * time.seconds for _, time in times],
            c=[c.num_nodes for c, _ in times],
            s=18,
        )
        figure.colorbar(shown, ax=left, label="N, nodes")
        left.set(
            xlabel="rows, N + P * k",
            ylabel="step, ms",
            ylim=(0, None),
            title=f"batch {batch_size}, context {tuner.context}",
        )
        for kind in sorted({point.candidate.kind for point in batch.grid}):
            part = [point for point in batch.grid if point.candidate.kind == kind and point.candidate.num_nodes > 1]
            xs, ys = [p.candidate.rows for p in part], [p.tokens_per_second for p in part]
            right.scatter(xs, ys, s=8, alpha=0.5, label=f"{kind}, estimated")
        xs, ys = [p.candidate.rows for p in batch.final], [p.tokens_per_second for p in batch.final]
        right.scatter(xs, ys, s=40, facecolors="none", edgecolors="black", label="measured finalists")
        for point, marker, label in ((batch.point(batch.own), "s", "predictor's own"), (batch.chosen, "*", "chosen")):
            right.plot(
                point.candidate.rows,
                point.tokens_per_second,
                marker,
                markersize=12,
                markerfacecolor="none",
                label=label,
            )
        right.axhline(batch.plain.tokens_per_second, linestyle="--", color="grey", label="plain decoding")
        right.set(xlabel="rows, N + P * k", ylabel="tokens per second", ylim=(0, None), title=name)
        right.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
