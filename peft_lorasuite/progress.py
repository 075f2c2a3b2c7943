"""Progress bars: library code is passed a function and never prints itself. Text that is lost stops no work."""

from __future__ import annotations

import sys
from collections.abc import Collection, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from typing import Any, Protocol, TypeVar

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

    yield from tqdm(items, desc=title, delay=2.0, leave=False, file=_LenientStream(sys.stderr))


@contextmanager
def stage(progress: Progress, title: str) -> Iterator[None]:
    """Report the body of a ``with`` statement as one step, in which loops may report their own."""
    steps = iter(progress(title, [None]))
    next(steps)
    try:
        yield
        next(steps, None)
    finally:
        if isinstance(steps, Generator):
            steps.close()  # also where an error keeps the frame alive: a bar must not outlast its stage


def numbered(progress: Progress, stages: Sequence[str]) -> Progress:
    """Return a progress that writes its number before the title of each of the given stages, such as ``2/3``."""

    def with_number(title: str, items: Collection[Item], /) -> Iterable[Item]:
        number = f"{stages.index(title) + 1}/{len(stages)} " if title in stages else ""
        return progress(number + title, items)

    return with_number


@contextmanager
def lenient_stderr() -> Iterator[None]:
    """Ignore failures of standard error, such as those of a closed pipe or a full disk: they must not stop the work."""
    stream: Any = _LenientStream(sys.stderr)
    with redirect_stderr(stream):
        yield


class _LenientStream:
    """A text stream that ignores what cannot be written."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()
