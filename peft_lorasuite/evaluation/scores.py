"""Results of an evaluation: outcome of every item, intervals, paired comparison, JSON. Does not import torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import LoraSuiteError, unknown_name_error
from ..io.dataclass_schema import record_of
from ..io.json_file import read_json
from ..io.output import write_file
from ..io.schema import PLAIN, TEXT, ListOf, number, optional

Z = 1.959963984540054
"""Quantile of the normal distribution for two-sided 95 % intervals."""
_VERSION = 1


@dataclass(frozen=True)
class TaskScore:
    """One model's score on one benchmark.

    Attributes:
        task: Name of the benchmark in the LLM-Adapters collection.
        items: Hash of each item, in the order of ``outcomes``, to compare two scores item by item.
        outcomes: 1.0 for a correct answer, 0.0 for a wrong one.
        answered: Share of items whose generation has an answer; None for ``scoring="likelihood"``. A low share shows
            that the model lacks the format rather than the knowledge.
    """

    task: str
    items: tuple[str, ...]
    outcomes: tuple[float, ...]
    answered: float | None = None
    metric: str = "accuracy"

    def __post_init__(self) -> None:
        if not self.outcomes or len(self.items) != len(self.outcomes):
            raise LoraSuiteError(
                "every item must have one outcome",
                where=self.task,
                got=f"{len(self.outcomes)} outcomes, {len(self.items)} items",
            )

    @property
    def n(self) -> int:
        """Number of items."""
        return len(self.outcomes)

    @property
    def value(self) -> float:
        """Mean outcome, from 0 to 1."""
        return math.fsum(self.outcomes) / self.n

    @property
    def stderr(self) -> float:
        """Standard error of the mean; 0 if all outcomes are equal, see `interval` then."""
        return math.sqrt(self.value * (1 - self.value) / max(self.n - 1, 1))

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval, which is not empty at 0 and 1 and stays between them."""
        n, p = self.n, self.value
        middle = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
        half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
        return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class Evaluation:
    """One model's scores on several benchmarks, in the order of the papers' tables.

    Attributes:
        tasks: The scores.
        model: Folder, Hub id or class name of the model.
        adapter: Folder or Hub id of the PEFT adapter on it, if one was given.
        scoring: ``"generate"`` or ``"likelihood"``.
        settings: What else the scores depend on (limit, seed, template, token limits, versions).
    """

    tasks: tuple[TaskScore, ...]
    model: str
    scoring: str
    adapter: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.tasks:
            raise LoraSuiteError("an evaluation must have at least one task")

    def __getitem__(self, task: str) -> TaskScore:
        """Return the score of one benchmark."""
        for score in self.tasks:
            if score.task == task:
                return score
        raise unknown_name_error("benchmark", task, [score.task for score in self.tasks])

    @property
    def average(self) -> float:
        """Mean over the benchmarks, each counted once as in the papers, from 0 to 1."""
        return math.fsum(score.value for score in self.tasks) / len(self.tasks)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of `average`, from the benchmarks' intervals (independent items)."""
        return _combine((score.value, score.interval) for score in self.tasks)[1]

    def to_dict(self) -> dict[str, Any]:
        """Return everything, derived numbers included, as JSON values."""
        tasks = [
            {**asdict(score), "n": score.n, "value": score.value, "stderr": score.stderr, "interval": score.interval}
            for score in self.tasks
        ]
        head = {"version": _VERSION, "model": self.model, "adapter": self.adapter, "scoring": self.scoring}
        average = {"average": self.average, "interval": self.interval}
        return {**head, **average, "settings": dict(self.settings), "tasks": tasks}

    def save(self, path: str | Path) -> None:
        """Write the evaluation as JSON, whole or not at all; an existing file is replaced."""
        write_file(path, json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Evaluation:
        """Rebuild an evaluation from `to_dict`; derived numbers are computed again."""
        if data.get("version") != _VERSION:
            raise LoraSuiteError("not an evaluation of this version", got=data.get("version"), wanted=_VERSION)
        tasks = tuple(
            TaskScore(
                t["task"], tuple(t["items"]), tuple(t["outcomes"]), t.get("answered"), t.get("metric", "accuracy")
            )
            for t in data["tasks"]
        )
        return cls(tasks, data["model"], data["scoring"], data["adapter"], data["settings"])

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Read a file written by `save`.

        Raises:
            LoraSuiteError: For any other file.
        """
        return cls.from_dict(read_json(Path(path), where=str(path), schema=EVALUATION))


EVALUATION = replace(
    record_of(
        Evaluation, adapter=optional(TEXT), model=TEXT,
        tasks=ListOf(item=replace(record_of(TaskScore, outcomes=ListOf(item=number(0.0, high=1.0))), others=PLAIN)),
    ),
    required=("tasks", "model", "scoring", "adapter", "settings"), others=PLAIN,
)  # fmt: skip
"""Schema of a saved evaluation."""


@dataclass(frozen=True)
class Difference:
    """Paired difference of two models on the same items.

    Attributes:
        name: Benchmark, or ``average``.
        value: First minus second, from -1 to 1.
        stderr: Its standard error.
        interval: Its 95 % interval.
        relative: ``value`` divided by the second model's score (the relative gain of Cross-LoRA); None if that is 0.
        n: Number of items.
        wins: Items that only the first model answers correctly.
        losses: Items that only the second model answers correctly.
    """

    name: str
    value: float
    stderr: float
    interval: tuple[float, float]
    relative: float | None
    n: int
    wins: int
    losses: int


@dataclass(frozen=True)
class Comparison:
    """Paired differences of two models, per benchmark and of the averages."""

    tasks: tuple[Difference, ...]
    average: Difference


def compare(a: Evaluation, b: Evaluation) -> Comparison:
    """Compare two models item by item: how much better ``a`` is than ``b``.

    The interval per benchmark is that of Agresti and Min (half an item added to each of the four cells of the paired
    table), which is not empty if the models agree on every item.

    Raises:
        LoraSuiteError: If the two were not scored in the same way on the same items.
    """
    check_same_items({"the first": a, "the second": b})
    tasks = tuple(_difference(one, other) for one, other in zip(a.tasks, b.tasks, strict=True))
    value, interval = _combine((d.value, d.interval) for d in tasks)
    stderr = math.sqrt(math.fsum(d.stderr**2 for d in tasks)) / len(tasks)
    counts = (sum(d.n for d in tasks), sum(d.wins for d in tasks), sum(d.losses for d in tasks))
    return Comparison(tasks, Difference("average", value, stderr, interval, _ratio(value, b.average), *counts))


def _difference(a: TaskScore, b: TaskScore) -> Difference:
    n, value = a.n, a.value - b.value
    wins = sum(one > other for one, other in zip(a.outcomes, b.outcomes, strict=True))
    losses = sum(one < other for one, other in zip(a.outcomes, b.outcomes, strict=True))
    stderr = math.sqrt(max((wins + losses) / n - value**2, 0.0) / max(n - 1, 1))
    middle = (wins - losses) / (n + 2)
    half = Z * math.sqrt((wins + losses + 1) / (n + 2) - middle**2) / math.sqrt(n + 2)
    interval = (max(-1.0, middle - half), min(1.0, middle + half))
    return Difference(a.task, value, stderr, interval, _ratio(value, b.value), n, wins, losses)


def _ratio(value: float, base: float) -> float | None:
    return value / base if base else None


def _combine(parts: Iterable[tuple[float, tuple[float, float]]]) -> tuple[float, tuple[float, float]]:
    """Return the mean of independent values and its interval by MOVER: squared distances to the limits add up."""
    rows = list(parts)
    mean = math.fsum(value for value, _ in rows) / len(rows)
    down = math.sqrt(math.fsum((value - low) ** 2 for value, (low, _) in rows)) / len(rows)
    up = math.sqrt(math.fsum((high - value) ** 2 for value, (_, high) in rows)) / len(rows)
    return mean, (mean - down, mean + up)


def check_same_items(rows: Mapping[str, Evaluation]) -> None:
    """Raise `LoraSuiteError` unless all evaluations scored the same items in the same way."""
    (first, one), *others = rows.items()
    for label, other in others:
        if [s.task for s in one.tasks] != [s.task for s in other.tasks]:
            raise LoraSuiteError(f"{first} and {label} were not evaluated on the same benchmarks")
        if one.scoring != other.scoring:
            raise LoraSuiteError(f"{first} and {label} were not scored in the same way", got=other.scoring)
        for left, right in zip(one.tasks, other.tasks, strict=True):
            if left.items != right.items:
                what = f"{first} and {label} were not evaluated on the same items"
                raise LoraSuiteError(what, where=left.task, do="use the same data, limit and seed")
