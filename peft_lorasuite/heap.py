"""Memory that was used: what was freed goes back to the system."""

from __future__ import annotations

import ctypes
import gc
import sys
from functools import cache
from typing import Any


def give_back() -> None:
    """Hand the heap's free pages back to the system; takes about a millisecond.

    glibc keeps what is freed, in pieces too small for the next layer's weights, so that a process which holds one layer
    at a time grows with every layer. Other C libraries give back by themselves.
    """
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def free_models() -> None:
    """Free models that nobody uses any more: PEFT's wrappers, and accelerate's hooks, hold a model that holds them."""
    gc.collect()
    give_back()


@cache
def _glibc() -> Any:
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") else None
