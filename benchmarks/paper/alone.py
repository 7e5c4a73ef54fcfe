"""One figure by its own command."""

from __future__ import annotations

from benchmarks.commands import run
from benchmarks.paper.command import command
from benchmarks.paper.figures import FIGURES


def alone(name: str) -> None:
    """The command of the figure `name`."""
    figure = FIGURES[name]
    run(command({name: figure}, (figure.__doc__ or "").splitlines()[0]))
