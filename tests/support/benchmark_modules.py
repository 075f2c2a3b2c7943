"""Importing the programs of benchmarks/, which import each other by their bare names."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@contextmanager
def benchmark_modules(*names: str) -> Iterator[tuple[ModuleType, ...]]:
    """Yield the modules; their folder is on the path for as long, for what they import later."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield tuple(import_module(name) for name in names)
    finally:
        sys.path.remove(str(BENCHMARKS))
