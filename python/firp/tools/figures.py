"""Figures for people: what is gained is never rounded up, what it costs never down."""

from __future__ import annotations

import math
from decimal import ROUND_DOWN, ROUND_UP, Context, Decimal


def cut(value: float, places: int = 2) -> str:
    """A gain, such as a ratio, tau or an accuracy: that many decimals, towards zero."""
    return _decimals(value, places, ROUND_DOWN)


def raised(value: float, places: int = 2) -> str:
    """A cost, such as a loss: that many decimals, away from zero."""
    return _decimals(value, places, ROUND_UP)


def _decimals(value: float, places: int, rounding: str) -> str:
    """Of the number's first 12 digits: what sums of binary floats leave after those is no figure."""
    if not math.isfinite(value):
        return str(float(value))
    wide = Context(prec=400)  # for any float
    return str(Decimal(f"{value:.12g}").quantize(Decimal(1).scaleb(-places), rounding, wide))
