"""Progress in a terminal: one line per stage with its time, and a bar on a terminal while the stage runs."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Collection, Iterator
from importlib.util import find_spec
from typing import Any, TypeVar

from ..errors import printable
from ..progress import Progress

Item = TypeVar("Item")
WIDTH = 44
"""Columns of a title; the time comes behind it."""
REPORTED = 60.0
"""Seconds after which a stage without a bar is reported again."""


def show_stages() -> Progress:
    """Return the progress of a command, on standard error: with rich's bar on a terminal where rich is installed."""
    terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    return Stages(_Bar if terminal and find_spec("rich") else _Lines)


class Stages:
    """A `Progress` that writes a line when an outermost loop is done; loops inside it only move its bar.

    Args:
        view: Makes what is shown of a stage while it runs, from its title.
    """

    def __init__(self, view: Callable[[str], _Lines]) -> None:
        self.view = view
        self.current: _Lines | None = None

    def __call__(self, title: str, items: Collection[Item], /) -> Iterator[Item]:
        """Iterate over ``items``."""
        if self.current is not None:
            yield from self.current.follow(title, items)
            return
        start, self.current = time.perf_counter(), self.view(printable(title))
        try:
            yield from self.current.follow(title, items)
        finally:
            self.current.close()
            self.current = None
        sys.stderr.write(f"{printable(title):{WIDTH}} {duration(time.perf_counter() - start)}\n")
        sys.stderr.flush()


class _Lines:
    """What is shown of a stage without a bar: how far it is, once a minute."""

    def __init__(self, title: str) -> None:
        self.title, self.reported = title, time.perf_counter()

    def follow(self, title: str, items: Collection[Item]) -> Iterator[Item]:
        """Iterate over the items of a loop."""
        start, count = time.perf_counter(), len(items)
        for number, item in enumerate(items):
            yield item
            now, done = time.perf_counter(), number + 1
            if done < count and now - self.reported >= REPORTED:
                left = duration((now - start) * (count - done) / done)
                inner = "" if self.title.endswith(title) else f" ({printable(title)})"
                sys.stderr.write(f"{self.title}{inner}: {done / count:.0%}, {left} left\n")
                sys.stderr.flush()
                self.reported = now

    def close(self) -> None:
        """End the stage."""


class _Bar(_Lines):
    """What is shown of a stage on a terminal: rich's bar with the time left, which disappears at the end."""

    def __init__(self, title: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), TaskProgressColumn(),
            TimeRemainingColumn(),
        )  # fmt: skip
        self.title = title
        self.bars = Progress(*columns, console=Console(stderr=True), transient=True)
        self.task: Any = self.bars.add_task(title, total=None)
        self.bars.start()

    def follow(self, title: str, items: Collection[Item]) -> Iterator[Item]:
        """Iterate over the items of a loop; a single item says nothing of how far the stage is."""
        shown = self.title if self.title.endswith(title) else f"{self.title}: {printable(title)}"
        total = len(items) if len(items) > 1 else None
        self.bars.reset(self.task, total=total, description=shown)
        for item in items:
            yield item
            self.bars.advance(self.task)
        self.bars.reset(self.task, total=None, description=self.title)

    def close(self) -> None:
        """Take the bar away."""
        self.bars.stop()


def duration(seconds: float) -> str:
    """Return a time as people write it: ``0.4 s``, ``12 s``, ``3:05 min``, ``1:02 h``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02} h"
