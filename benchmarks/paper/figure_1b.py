"""Figure 1b: tokens per forward against draft size. Drafting is replayed on recorded marginals; nothing is timed.

python -m benchmarks.paper.figure_1b
"""

from __future__ import annotations

from typing import Any

import firp
from firp.bench.runner import TAU_FORMULA
from firp.tune.acceptance import replay

from benchmarks.paper.setup import NAMES, Setup

NAME = "figure-1b"
SIZES = (2, 4, 8, 16, 32, 64)


def measure(setup: Setup) -> None:
    """Parts by drafter: for each size, all prompts and each category, the steps and tokens of a replay."""
    document = setup.document(NAME, sizes=SIZES, tau=TAU_FORMULA, tree="dynamic, N nodes with the root, P = N")
    for drafter in setup.drafters:
        document.part(drafter, setup.made_from(drafter), lambda drafter=drafter: _replays(setup, drafter))


def _replays(setup: Setup, drafter: str) -> dict:
    recordings, transition = setup.recordings(drafter), setup.transition_of(drafter)
    k = recordings[0].candidates.shape[1]
    categories = sorted({answer.category for answer in setup.answers})
    figures: dict[str, Any] = {"offsets": k, "rows": {}, "tau": {}, "categories": {name: {} for name in categories}}
    for size in SIZES:
        tree = firp.TreeConfig(size, size)
        found, total = {}, [0, 0]
        for name in categories:
            own = [r for r, answer in zip(recordings, setup.answers, strict=True) if answer.category == name]
            stats = replay(own, tree, k, transition).stats
            found[name] = stats.tau
            total = [total[0] + stats.tokens, total[1] + stats.steps]
        figures["tau"][str(size)] = total[0] / total[1]
        figures["rows"][str(size)] = size * (1 + k) if drafter.startswith("firp") else size
        for name, tau in found.items():
            figures["categories"][name][str(size)] = tau
    return figures


def draw(document: dict, pyplot: Any) -> Any:
    drawn, axes = pyplot.subplots(figsize=(6, 4))
    for name, part in document["parts"].items():
        tau = part["figures"]["tau"]
        axes.plot([int(size) for size in tau], list(tau.values()), marker="o", label=NAMES[name])
    axes.axhline(1, color="grey", linestyle=":", label="plain decoding")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="nodes of the draft tree, root included", ylabel="tokens per forward (tau)")
    axes.legend()
    drawn.tight_layout()
    return drawn


if __name__ == "__main__":
    from benchmarks.paper.alone import alone

    alone(NAME)
