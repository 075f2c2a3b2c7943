"""Measured results of one task, and how much of the gap from the base model to full retraining each recovers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import LoraSuiteError
from ..evaluation.scores import Evaluation
from ..io.json_file import read_json
from ..io.paths import is_folder
from ..io.schema import PLAIN, TEXT, ListOf, Record, check, integer, number, optional
from ..mapping.fingerprint import public_name

BASE, FULL = "base", "full"
"""Results that bound the gap: the new backbone without an adapter, and a LoRA trained on it with all labels."""
OLD = ("old", "old-adapted")
"""Results on the old backbone: shown for comparison, without a share of the gap."""
ORDER = (*OLD, BASE, None, FULL)
"""How results are sorted; None stands for all others, by name."""
SMALLEST_GAP = {"nll": 0.1, "accuracy": 0.01}
"""Gap below which no share of it is reported: in nats per token, in share of the items."""


@dataclass(frozen=True)
class Result:
    """One measured result.

    Attributes:
        label: What was measured.
        accuracy: Accuracy, from 0 to 1.
        interval: Its 95 % interval.
        items: Number of test items.
        nll: Negative log-likelihood of the answers in nats per token, if it was measured.
        seconds: Time it took, if it was recorded.
    """

    label: str
    accuracy: float
    interval: tuple[float, float]
    items: int
    nll: float | None = None
    seconds: float | None = None


_share = number(0.0, high=1.0)
RESULT = Record(
    fields={
        "row": TEXT, "accuracy": _share, "interval": ListOf(item=number(), fewest=2, most=2), "items": integer(1),
        "nll": optional(number()), "seconds": optional(number(0.0)),
    },
    required=("row", "accuracy", "interval", "items"), others=PLAIN,
)  # fmt: skip
"""Schema of a file of ``benchmarks/gap.py``."""


def read_results(folder: str | Path) -> list[Result]:
    """Read the results written by ``benchmarks/gap.py`` or ``evaluate -o``, sorted by `ORDER`.

    Raises:
        LoraSuiteError: If the folder does not exist, has no results, or a file in it is malformed.
    """
    root = Path(folder).expanduser()
    if not is_folder(root):
        raise LoraSuiteError("the folder of results does not exist", where=root, wanted="a folder of evaluate -o")
    files = sorted(root.glob("*.json"), key=lambda path: (len(path.stem) if path.stem.isdigit() else 0, path.stem))
    results = [_read_result(path) for path in files]
    if not results:
        raise LoraSuiteError("the folder has no results", where=root, wanted="JSON files, one per result")
    return sorted(results, key=lambda result: ORDER.index(result.label if result.label in ORDER else None))


def _read_result(path: Path) -> Result:
    values = read_json(path, where=str(path))
    if "scoring" in values:
        return _from_evaluation(Evaluation.load(path))
    check(values, RESULT, where=str(path))
    low, high = values["interval"]
    return Result(
        values["row"], values["accuracy"], (low, high), values["items"], values.get("nll"), values.get("seconds")
    )


def _from_evaluation(evaluation: Evaluation) -> Result:
    label = public_name(evaluation.adapter) if evaluation.adapter else BASE
    return Result(label, evaluation.average, evaluation.interval, sum(score.n for score in evaluation.tasks))


@dataclass(frozen=True)
class Gap:
    """Results measured against the gap.

    Attributes:
        metric: ``"nll"`` or ``"accuracy"``: what the gap is measured in.
        ceiling: Label of the result that counts as 1; ``base`` counts as 0.
        shares: Share of the gap that each result recovers; None for results on the old backbone.
    """

    metric: str
    ceiling: str
    shares: tuple[float | None, ...]


def measure_gap(results: Sequence[Result]) -> Gap | None:
    """Measure results against the gap from the base model to full retraining, or else to the old adapter.

    The gap is measured in negative log-likelihood if every result has it, which separates results better than the
    accuracy on few items, and in accuracy otherwise.

    Returns:
        The shares; None if one of the two bounds is missing, or the gap is too small for a share to mean anything.
    """
    by_label = {result.label: result for result in results}
    ceiling = next((by_label[name] for name in (FULL, "old-adapted") if name in by_label), None)
    base = by_label.get(BASE)
    if base is None or ceiling is None:
        return None
    metric = "nll" if all(result.nll is not None for result in results) else "accuracy"
    whole = _improvement(base, ceiling, metric)
    if whole < SMALLEST_GAP[metric]:
        return None
    shares = tuple(None if result.label in OLD else _improvement(base, result, metric) / whole for result in results)
    return Gap(metric, ceiling.label, shares)


def _improvement(base: Result, result: Result, metric: str) -> float:
    """How much better than the base model a result is."""
    if metric == "nll":
        return float(base.nll or 0.0) - float(result.nll or 0.0)
    return result.accuracy - base.accuracy
