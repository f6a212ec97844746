"""What the packages' benchmarks make of the times that they measure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call, over all passes."""

    us: float
    us_min: float
    us_max: float
    repetitions: int


def summarize(us: Iterable[float]) -> Timing:
    """Return median, minimum and maximum."""
    ordered = sorted(us)
    median, least, most = (
        round(t, 4) for t in (statistics.median(ordered), ordered[0], ordered[-1])
    )
    return Timing(median, least, most, repetitions=len(ordered))
