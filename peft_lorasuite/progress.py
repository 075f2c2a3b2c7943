"""Progress bars: library code is passed a function and never prints itself."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from typing import Protocol, TypeVar

Item = TypeVar("Item")


class Progress(Protocol):
    """A callable that passes items through and may show how far the loop is."""

    def __call__(self, title: str, items: Collection[Item], /) -> Iterable[Item]:
        """Iterate over ``items``."""
        ...


def no_progress(title: str, items: Collection[Item], /) -> Iterable[Item]:
    """Show nothing."""
    del title
    return items


def progress_bars(title: str, items: Collection[Item], /) -> Iterator[Item]:
    """Show a bar on standard error for loops that take longer than two seconds."""
    from tqdm.auto import tqdm
    from tqdm.utils import ObjectWrapper

    class Lenient(ObjectWrapper):
        """A stream whose failures, such as those of a closed pipe or a full disk, do not stop the work."""

        def write(self, text: str) -> None:
            with suppress(OSError):
                self._wrapped.write(text)

        def flush(self) -> None:
            with suppress(OSError):
                self._wrapped.flush()

    yield from tqdm(items, desc=title, delay=2.0, leave=False, file=Lenient(sys.stderr))
