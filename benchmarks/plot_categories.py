"""Draw tau and speedup by category from a `firp bench --json` file: `python benchmarks/plot_categories.py --help`.

The picture is plain SVG text, so the same figures always give the same bytes, and it follows the reader's colour
scheme. Printed numbers are cut after two decimals, never rounded up.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated
from xml.sax.saxutils import escape

import typer
from firp.tools.figures import cut

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "benchmarks/results/cpu-epyc-avx2-2026-11-29.json"
PICTURE = ROOT / "docs/assets/categories.svg"

STYLE = """
    .page { fill: #ffffff; }
    text { font: 13px system-ui, sans-serif; fill: #24292f; }
    .title { font-weight: 600; } .small { font-size: 11px; fill: #57606a; } .end { text-anchor: end; }
    .tau { fill: #0969da; } .speedup { fill: #1a7f37; } .spread { stroke: #24292f; stroke-width: 1.5; }
    .base { stroke: #8c959f; stroke-dasharray: 3 3; }
    @media (prefers-color-scheme: dark) {
      .page { fill: #0d1117; }
      text { fill: #e6edf3; } .small { fill: #9198a1; } .spread { stroke: #e6edf3; }
      .tau { fill: #4493f8; } .speedup { fill: #3fb950; } .base { stroke: #656c76; }
    }
"""
WIDTH, ROW, TOP, BAR = 760, 28, 58, 16
LABELS, PANEL, GAP = 120, 230, 90


def rows(document: dict) -> list[tuple[str, float, dict[str, float]]]:
    """(category, tau, speedup with median, min and max) of FIRP, the fastest category first.

    Raises:
        ValueError: the file has no categories, or one without FIRP's figures.
    """
    if not document.get("categories"):
        raise ValueError("categories: got none, expected the JSON of `firp bench` with method firp")
    found = []
    for name, part in document["categories"].items():
        firp = part["methods"].get("firp")
        if firp is None:
            raise ValueError(f"categories: got {name!r} without method firp, expected its figures")
        found.append((name, firp["tau"], firp["speedup_vs_ar"]))
    return sorted(found, key=lambda row: -row[2]["median"])


def draw(document: dict) -> str:
    """The SVG: one bar of tau and one of speedup, with its spread, a category."""
    chosen = rows(document)
    environment, settings = document["environment"], document["settings"]
    height = TOP + ROW * len(chosen) + 34
    left, right = LABELS, LABELS + PANEL + GAP
    scale = PANEL / max(2.0, *(max(tau, speedup["max"]) for _, tau, speedup in chosen))
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" role="img">',
        "  <title>tau and speedup of FIRP by category of prompt</title>",
        f"  <style>{STYLE}  </style>",
        '  <rect class="page" width="100%" height="100%" rx="8"/>',
        f'  <text class="title" x="{left}" y="22">tau</text>',
        f'  <text class="small" x="{left}" y="40">tokens of decode steps / decode steps</text>',
        f'  <text class="title" x="{right}" y="22">speedup</text>',
        f'  <text class="small" x="{right}" y="40">over plain decoding in this engine, with min-max</text>',
    ]
    for index, (name, tau, speedup) in enumerate(chosen):
        top = TOP + index * ROW
        line, middle = top + BAR - 3, top + BAR / 2
        spread = [right + speedup[end] * scale for end in ("min", "max")]
        out += [
            f'  <text class="end" x="{left - 10}" y="{line}">{escape(name)}</text>',
            f'  <rect class="tau" x="{left}" y="{top}" width="{tau * scale:.1f}" height="{BAR}" rx="2"/>',
            f'  <text x="{left + tau * scale + 6:.1f}" y="{line}">{cut(tau)}</text>',
            f'  <rect class="speedup" x="{right}" y="{top}" width="{speedup["median"] * scale:.1f}" '
            f'height="{BAR}" rx="2"/>',
            f'  <path class="spread" d="M{spread[0]:.1f} {middle:.1f}H{spread[1]:.1f}"/>',
            f'  <text x="{max(spread) + 6:.1f}" y="{line}">{cut(speedup["median"])}x</text>',
        ]
    bottom = TOP + ROW * len(chosen)
    out += [f'  <path class="base" d="M{start + scale:.1f} {TOP - 6}V{bottom - 6}"/>' for start in (left, right)]
    source = (
        f"{settings['model']}, {environment['dtype']}, {environment['device']}, {environment['threads']} threads, "
        f"{settings['num_prompts']} prompts, {settings['repeats']} repeats, {environment['date']}; dashed: plain "
        f"decoding"
    )
    out += [f'  <text class="small" x="{left}" y="{bottom + 18}">{escape(source)}</text>', "</svg>"]
    return "\n".join(out) + "\n"


def main(
    figures: Annotated[Path, typer.Option(help="JSON written by firp bench.")] = FIGURES,
    out: Annotated[Path, typer.Option(help="Where to write the SVG.")] = PICTURE,
) -> None:
    """Draw tau and speedup by category."""
    out.write_text(draw(json.loads(figures.read_text())))


if __name__ == "__main__":
    typer.run(main)
