"""Memory: what was freed goes back to the system, and a head is not copied once a row."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any


def release_memory() -> None:
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
    release_memory()


@contextmanager
def contiguous_head_input(model: Any) -> Iterator[None]:
    """Give the language-model head its input in one piece while a model writes.

    `generate` hands it the last position of every row, a slice. torch takes that, on a CPU and with frozen weights, for
    a product a row, and in bfloat16 copies the whole head for every one of them: 17 GB for 64 rows of a vocabulary of
    150,000.
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
