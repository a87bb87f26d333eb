"""Medians with their spread, and ratios of what was measured in turns."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile (inclusive method); of one value, three times itself."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def spread(values: Sequence[float]) -> dict[str, Any]:
    """``median``, ``q1``, ``q3``, ``iqr``, ``min``, ``max`` and ``n`` of ``values`` (at least one)."""
    low, middle, high = quartiles(values)
    return {
        "median": middle,
        "q1": low,
        "q3": high,
        "iqr": high - low,
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """:func:`spread` of the ratios round by round, and ``of_medians``.

    Rounds of both were taken in turns: what disturbs a moment disturbs both, and leaves their ratio.
    """
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {**spread(ratios), "of_medians": statistics.median(ours) / statistics.median(theirs)}
