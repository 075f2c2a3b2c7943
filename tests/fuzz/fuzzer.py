"""Runs mutated inputs through the command line, and judges what comes out.

Every case ends in a right result, or in one error: exit code 1, one line without control characters, nothing written.
"""

from __future__ import annotations

import io
import logging
import random
import re
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from kinds import KINDS, Case, Change, mutation
from patience import limit
from world import World

from peft_lorasuite.cli.main import main

LIMIT = limit(20)
"""Seconds of one case."""
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
BARS = re.compile(r"\r|\x1b\[A|\x1b\[K")
"""What progress bars write."""
FAULTS = ("traceback", "hang", "error", "written", "wrong")


class Hang(BaseException):
    """A case that took too long."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of one case.

    Attributes:
        number: Number of the case; the same number and seed give the same case.
        kind: Kind of the case.
        verdict: ``refused``, ``same``, ``followed`` or ``valid``; or a fault: ``traceback``, ``hang``, ``error`` (not
            one printable line), ``written`` (files of a refused call), ``wrong`` (a wrong acceptance).
        detail: The message, or what is wrong.
        seconds: Time it took.
    """

    number: int
    kind: str
    verdict: str
    detail: str
    seconds: float


def run_cases(world: World, numbers: Iterable[int], seed: int, scratch: Path) -> Iterator[Outcome]:
    """Run the cases of these numbers."""
    for number in numbers:
        place = scratch / str(number)
        (place / "out").mkdir(parents=True)
        yield run_case(world, number, seed, place)
        shutil.rmtree(place, ignore_errors=True)


def run_case(world: World, number: int, seed: int, place: Path) -> Outcome:
    """Run one case in an empty folder."""
    rng = random.Random(f"{seed}-{number}")
    kind = rng.choices(list(KINDS), [weight for weight, _, _ in KINDS.values()])[0]
    return run_kind(world, kind, number, rng, place, mutation(rng))


def run_kind(world: World, kind: str, number: int, rng: random.Random, place: Path, change: Change) -> Outcome:
    """Run a case of one kind in an empty folder."""
    _, make, files = KINDS[kind]
    case = make(world, place, rng, rng.choice(files), change)
    start = time.perf_counter()
    verdict, detail = judge_case(case, place, rng)
    seconds = time.perf_counter() - start
    return Outcome(number, kind, "hang" if seconds > LIMIT else verdict, detail, seconds)


def judge_case(case: Case, place: Path, rng: random.Random) -> tuple[str, str]:
    """Run a case, and return its verdict with the details."""
    mode = rng.choice(["-q", "-q", "-q", "--json", ""])
    before = _listing(place)
    out, err = io.StringIO(), io.StringIO()
    try:
        with _limited(LIMIT), _captured(out, err, quiet=mode != ""):
            code = _call(case, mode, out, err)
            if code == 0:
                verdict = case.judge()
    except Hang:
        return "hang", "".join(traceback.format_stack(limit=1))
    except Exception:
        return "traceback", traceback.format_exc()
    text = out.getvalue() + BARS.sub("", err.getvalue())
    if CONTROL.search(text):
        return "error", f"control characters on the terminal: {text!r}"
    if code == 0:
        return ("wrong", verdict) if verdict.startswith("wrong") else (verdict, "")
    lines = [line for line in err.getvalue().splitlines() if line.strip()]
    if code != 1 or not lines or not lines[-1].startswith("peft-lorasuite: ") or (mode and len(lines) > 1):
        return "error", f"exit code {code}: {err.getvalue()!r}"
    if _listing(place) != before:
        return "written", str(sorted(_listing(place) ^ before))
    return "refused", lines[-1]


def _call(case: Case, mode: str, out: io.StringIO, err: io.StringIO) -> int:
    if callable(case.call):
        try:
            case.call()
        except ValueError as error:
            err.write(f"peft-lorasuite: {error}\n")
            return 1 if type(error).__name__ == "LoraSuiteError" else 3
        return 0
    try:
        return main([str(word) for word in [*case.call, *([mode] if mode else [])]])
    except SystemExit as stopped:  # argparse refuses names that look like options, on several lines
        err.seek(0)
        err.truncate()
        err.write("peft-lorasuite: wrong call\n")
        return 1 if stopped.code == 2 else 3


def _listing(place: Path) -> set[str]:
    return {str(path.relative_to(place)) for path in place.rglob("*")}


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # again, should something catch it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@contextmanager
def _captured(out: io.StringIO, err: io.StringIO, *, quiet: bool) -> Iterator[None]:
    root = logging.getLogger()
    handlers, root.handlers = root.handlers, []
    try:
        with redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("ignore" if quiet else "default")
            yield
    finally:
        root.handlers = handlers


def summarize(outcomes: list[Outcome]) -> dict[str, dict[str, int]]:
    """Count the outcomes of every kind."""
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for outcome in outcomes:
        counts[outcome.kind][outcome.verdict] += 1
    return {kind: dict(sorted(count.items())) for kind, count in counts.items()}


def faults(outcomes: list[Outcome]) -> list[Outcome]:
    """Return the cases that ended in neither a right result nor one error."""
    return [outcome for outcome in outcomes if outcome.verdict in FAULTS]


if sys.platform == "win32":
    raise ImportError("the time limit of a case needs SIGALRM")
