"""Time limits in seconds of a usual machine, which are longer on a slow one."""

from __future__ import annotations

import time
from functools import cache

STEPS, USUAL = 1_000_000, 0.06
"""Steps of a bare loop, and the seconds that they take on a usual core with nothing else to do."""


def limit(seconds: float) -> float:
    """Return how long something may take here that may take these seconds on a usual machine."""
    return seconds * slowness()


@cache
def slowness() -> float:
    """Return how many times slower this machine is than a usual one; 1 for a faster one.

    Where others share the cores, programs slow down more than a bare loop does: hence the square.
    """
    start = time.perf_counter()
    for _ in range(3 * STEPS):
        pass
    return max(1.0, (time.perf_counter() - start) / (3 * USUAL)) ** 2
