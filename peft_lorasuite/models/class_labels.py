"""Labels of texts as tensors, checked against the labels of a classifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from ..errors import LoraSuiteError
from ..text.texts import Text
from .classification import Row
from .task import MULTI_LABEL, REGRESSION, Task

Places = list[tuple[int, int]]
"""Row and position of every label."""


def infer_problem(task: Task, texts: Sequence[Text]) -> Task:
    """Return the task with several labels per text, if its problem type is not known and the labels are lists."""
    lists = not task.per_token and any(isinstance(text.label, (list, tuple)) for text in texts)
    return replace(task, problem=MULTI_LABEL) if lists and not task.problem and len(task.labels) > 1 else task


def place_labels(texts: Sequence[Text], rows: Sequence[Row], task: Task) -> tuple[Places, Tensor]:
    """Return the places of all labels, and the labels, (places, columns), as `class_loss.label_losses` reads them.

    The label of a word belongs to its first token; words that were cut off have none.

    Raises:
        LoraSuiteError: If a label is malformed or out of range, or texts of a token classifier have no words.
    """
    places: Places = []
    labels: list[list[float]] = []
    for number, (text, row) in enumerate(zip(texts, rows, strict=True)):
        where = f"text {number + 1}"
        if not task.per_token:
            places.append((number, row.places[-1]))
            labels.append(_read_label(text.label, task, where))
            continue
        for (start, _), label in zip(text.words, _word_labels(text, where), strict=True):
            position = next((at for at in row.places if row.spans[at][0] <= start < row.spans[at][1]), None)
            if position is not None and label != IGNORED:
                places.append((number, position))
                labels.append([float(_index(label, task, where))])
    if not places:
        raise LoraSuiteError("no word has a label", got=f"{len(texts)} texts")
    return places, torch.tensor(labels)


IGNORED = -100
"""Label of words that have none, as in transformers."""


def _word_labels(text: Text, where: str) -> Sequence[Any]:
    if not text.words:
        raise LoraSuiteError(
            "token classification needs texts with tokens", where=where, got="a text", wanted="tokens and ner_tags"
        )
    labels = text.label
    if not isinstance(labels, (list, tuple)) or len(labels) != len(text.words):
        got = len(labels) if isinstance(labels, (list, tuple)) else repr(labels)[:40]
        raise LoraSuiteError("every token must have a label", where=where, got=got, wanted=len(text.words))
    return labels


def _read_label(label: Any, task: Task, where: str) -> list[float]:
    if task.objective == REGRESSION:
        values = list(label) if isinstance(label, (list, tuple)) else [label]
        numbers = [_number(value, where) for value in values]
        if len(numbers) != len(task.labels):
            raise LoraSuiteError("wrong number of values", where=where, got=len(numbers), wanted=len(task.labels))
        return numbers
    if task.objective != MULTI_LABEL:
        return [float(_index(label, task, where))]
    values = list(label) if isinstance(label, (list, tuple)) else [label]
    if len(values) == len(task.labels) and all(value in (0, 1) for value in values):
        return [float(value) for value in values]
    chosen = {_index(value, task, where) for value in values}
    return [float(number in chosen) for number in range(len(task.labels))]


def _index(label: Any, task: Task, where: str) -> int:
    """Return the index of a label, given by name or by index."""
    if isinstance(label, str) and label in task.labels:
        return task.labels.index(label)
    number = int(label) if isinstance(label, str) and label.isdecimal() and len(label) < 10 else label
    if isinstance(number, Integral) and 0 <= int(number) < len(task.labels):
        return int(number)
    shown = ", ".join(task.labels[:5]) + (", ..." if task.labels[5:] else "")
    raise LoraSuiteError(
        "unknown label", where=where, got=repr(label)[:60], wanted=f"0 to {len(task.labels) - 1}, or {shown}"
    )


def _number(value: Any, where: str) -> float:
    try:
        number = float(value) if isinstance(value, (Real, str)) else float("nan")
    except ValueError:
        number = float("nan")
    if not abs(number) < float("inf"):
        raise LoraSuiteError("a value must be a finite number", where=where, got=repr(value)[:60])
    return number
