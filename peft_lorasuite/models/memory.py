"""Returning freed memory to the system, and avoiding a copy of the head per row."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any


def release_memory() -> None:
    """Return the heap's free pages to the system; takes about a millisecond.

    glibc keeps freed memory in pieces too small for the next layer's weights, so that a process that holds one layer at
    a time would grow with every layer. Other C libraries return it by themselves.
    """
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def free_models() -> None:
    """Free unreferenced models: PEFT's wrappers and accelerate's hooks form reference cycles with theirs."""
    gc.collect()
    release_memory()


@contextmanager
def contiguous_head_input(model: Any) -> Iterator[None]:
    """Make the input of the language-model head contiguous during generation.

    `generate` passes a slice, the last position of every row. On a CPU and with frozen weights torch computes that as
    one product per row, and in bfloat16 copies the whole head for each: 17 GB for 64 rows and a vocabulary of 150,000.
    """
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda module, args: (args[0].contiguous(), *args[1:])
    )
    try:
        yield
    finally:
        hook.remove()


@cache
def _glibc() -> Any:
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") else None
