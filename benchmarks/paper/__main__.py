"""`python -m benchmarks.paper`: every figure, or some."""

from benchmarks.commands import run
from benchmarks.paper.command import command
from benchmarks.paper.figures import FIGURES

run(command(FIGURES, "Measure and draw the figures of the FIRP paper with a small model. Run again to go on."))
