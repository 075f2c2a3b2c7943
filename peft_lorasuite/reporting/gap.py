"""Measured rows of one task, and how much of the gap from the bare backbone to full retraining each recovers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import LoraSuiteError
from ..evaluation.scores import Evaluation
from ..io.paths import is_folder
from ..mapping.fingerprint import public_name

BASE, FULL = "base", "full"
"""Rows that bound the gap: the bare new backbone, and a LoRA that is trained on it with all labels."""
OLD = ("old", "old-adapted")
"""Rows of the old backbone: context, not on the way from base to full."""
ORDER = (*OLD, BASE, None, FULL)
"""How rows are sorted; None stands for all others, by name."""
LEAST = {"nll": 0.1, "accuracy": 0.01}
"""Gap below which a share of it is not told: nats per token, share of the items."""


@dataclass(frozen=True)
class Gain:
    """One measured row.

    Attributes:
        label: What was measured.
        accuracy: From 0 to 1.
        interval: 95 % interval of it.
        items: Test items.
        nll: Negative log-likelihood of the answers in nats per token, where it was measured.
        seconds: What it took, where it was noted.
    """

    label: str
    accuracy: float
    interval: tuple[float, float]
    items: int
    nll: float | None = None
    seconds: float | None = None


def read_rows(folder: str | Path) -> list[Gain]:
    """Read the rows that ``benchmarks/gap.py`` or ``evaluate -o`` wrote, the bare backbone first, the full run last.

    Raises:
        LoraSuiteError: When there is no such folder, no row in it, or a file that is none.
    """
    home = Path(folder).expanduser()
    if not is_folder(home):
        raise LoraSuiteError("there is no such folder of rows", where=home, wanted="the folder that evaluate -o wrote")
    files = sorted(home.glob("*.json"), key=lambda path: (len(path.stem) if path.stem.isdigit() else 0, path.stem))
    rows = [_row(path) for path in files]
    if not rows:
        raise LoraSuiteError("there are no rows in the folder", where=home, wanted="JSON files, one a row")
    return sorted(rows, key=lambda row: ORDER.index(row.label if row.label in ORDER else None))


def _row(path: Path) -> Gain:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if "scoring" in values:
            return _evaluated(Evaluation.from_dict(values))
        low, high = (float(value) for value in values["interval"])
        nll, seconds = (None if values.get(name) is None else float(values[name]) for name in ("nll", "seconds"))
        return Gain(str(values["row"]), float(values["accuracy"]), (low, high), int(values["items"]), nll, seconds)
    except (KeyError, TypeError, AttributeError, ValueError, OSError) as error:
        if isinstance(error, LoraSuiteError):
            raise
        raise LoraSuiteError(f"not a measured row ({error!r})", where=path) from error


def _evaluated(found: Evaluation) -> Gain:
    label = public_name(found.adapter) if found.adapter else BASE
    return Gain(label, found.average, found.interval, sum(score.n for score in found.tasks))


@dataclass(frozen=True)
class Gap:
    """The gap that the rows are measured against.

    Attributes:
        value: ``"nll"`` or ``"accuracy"``: what the gap is counted in.
        ceiling: Label of the row that counts as 1; ``base`` counts as 0.
        shares: Each row's share; None for rows of the old backbone.
    """

    value: str
    ceiling: str
    shares: tuple[float | None, ...]


def gap(rows: Sequence[Gain]) -> Gap | None:
    """Measure the rows against the gap from the bare new backbone to full retraining, or else to the old adapter.

    It is counted in negative log-likelihood where every row has it, which tells rows apart that few items cannot, and
    in accuracy otherwise. None where a row of the two is missing or the gap is too small for a share to mean anything.
    """
    ends = {row.label: row for row in rows}
    ceiling = next((ends[name] for name in (FULL, "old-adapted") if name in ends), None)
    base = ends.get(BASE)
    if base is None or ceiling is None:
        return None
    value = "nll" if all(row.nll is not None for row in rows) else "accuracy"
    whole = _distance(base, ceiling, value)
    if whole < LEAST[value]:
        return None
    shares = tuple(None if row.label in OLD else _distance(base, row, value) / whole for row in rows)
    return Gap(value, ceiling.label, shares)


def _distance(base: Gain, row: Gain, value: str) -> float:
    """How much better than the bare backbone a row is."""
    if value == "nll":
        return float(base.nll or 0.0) - float(row.nll or 0.0)
    return row.accuracy - base.accuracy
