"""Running a function in a forked process that is killed (SIGKILL): after some seconds, or at a step of writing files.

Steps are the operations on files and folders below one folder whose path has a mark in it: opening, creating, renaming
and deleting. Only Linux and macOS can fork.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MARK = "peft-lorasuite-"
"""What the names of the package's temporary folders have in them."""
STEPS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link"}
"""Audit events of Python that are steps."""


class Steps:
    """Counts the steps of this process, and kills it before a given one.

    Args:
        place: Folder that is watched.
        last: The step, from 0, before which the process is killed; None counts only.
    """

    def __init__(self, place: Path, last: int | None = None) -> None:
        self.place, self.last, self.count = str(place), last, 0
        sys.addaudithook(self._see)

    def _see(self, event: str, values: tuple[Any, ...]) -> None:
        if event not in STEPS or not self._is_step(values):
            return
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1

    def _is_step(self, values: tuple[Any, ...]) -> bool:
        paths = [os.fsdecode(one) for one in values[:2] if isinstance(one, (str, bytes, os.PathLike))]
        below = any(path.startswith(self.place) and MARK in path for path in paths)
        # rmtree deletes by names that are relative to an open folder
        return below or (self.count > 0 and not any(path.startswith("/") for path in paths))


def fork(work: Callable[[], int], log: Path) -> int:
    """Start a function in a forked process, whose output goes to a file; return the process id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        code = work()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def finish(child: int) -> int:
    """Wait for a process; return its exit code, or the negative number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def count_steps(work: Callable[[], int], place: Path, log: Path) -> tuple[int, float]:
    """Run a function in another process; return its steps and seconds.

    Raises:
        SystemExit: If its exit code is not 0.
    """
    counted = log.with_suffix(".steps")

    def watched() -> int:
        steps = Steps(place)
        code = work()
        counted.write_text(str(steps.count))
        return code

    start = time.perf_counter()
    if finish(fork(watched, log)):
        raise SystemExit(log.read_text(errors="replace"))
    return int(counted.read_text()), time.perf_counter() - start


def kill_after(seconds: float, work: Callable[[], int], log: Path) -> bool:
    """Kill a function after some seconds; return whether it was killed and had not ended before."""
    child = fork(work, log)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return finish(child) == -signal.SIGKILL


def kill_at(step: int, work: Callable[[], int], place: Path, log: Path) -> bool:
    """Kill a function before one of its steps; return whether it was killed and had not ended before."""

    def watched() -> int:
        Steps(place, step)
        return work()

    return finish(fork(watched, log)) == -signal.SIGKILL
