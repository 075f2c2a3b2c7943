"""Numbers that callers give, checked where they enter: before the long work, from Python as from a command line."""

from __future__ import annotations

from numbers import Integral
from typing import Any

from .errors import LoraSuiteError

LARGEST_SEED = 2**32 - 1
"""What numpy takes, which the Trainer seeds beside torch."""


def check_whole(name: str, value: Any, least: int = 1, most: int | None = None) -> None:
    """Refuse what is no whole number, and one out of range."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise LoraSuiteError("must be a whole number", where=name, got=repr(value))
    if int(value) < least:
        raise LoraSuiteError(f"must be at least {least}", where=name, got=value)
    if most is not None and int(value) > most:
        raise LoraSuiteError(f"must be at most {most}", where=name, got=value)


def check_seed(seed: Any) -> None:
    """Refuse a seed that one of the generators would not take."""
    check_whole("seed", seed, 0, LARGEST_SEED)
