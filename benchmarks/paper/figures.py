"""All figures, by name, in the order they are made."""

from __future__ import annotations

from types import ModuleType

from benchmarks.paper import figure_1a, figure_1b, figure_3, figure_4, figure_5, table

MODULES = (figure_1a, figure_1b, figure_3, figure_4, figure_5, table)
FIGURES: dict[str, ModuleType] = {module.NAME: module for module in MODULES}
