"""Figures for people."""

from __future__ import annotations

import math


def cut(value: float) -> str:
    """Two decimals, towards zero: no ratio is rounded up."""
    return f"{math.floor(value * 100) / 100:.2f}"
