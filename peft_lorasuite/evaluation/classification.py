"""Evaluation of classifiers on labeled texts, with the metrics of scikit-learn."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters.opening import adapter_task_type, open_adapter
from ..errors import LoraSuiteError, check_integer, check_seed
from ..io.source import LoadOptions
from ..models.class_labels import infer_problem, place_labels
from ..models.classification import class_logits, encode_texts, padding_of_model
from ..models.restore import restore_model
from ..models.task import CLASSIFIERS, MULTI_LABEL, REGRESSION, LabelsLike, Task, model_task
from ..progress import Progress, no_progress
from ..text.examples import read_texts

COLUMNS: tuple[str, ...] = ("precision", "recall", "f1", "count")
"""Scores of one label."""


@dataclass(frozen=True)
class ClassEvaluation:
    """Scores of a classifier or a regression on labeled texts.

    Attributes:
        task: PEFT's task type.
        problem: transformers' ``problem_type``.
        labels: Names of the labels.
        n: Number of texts or, for token classification, of labeled tokens.
        scores: ``accuracy`` and ``f1`` (mean over the labels), with several labels per text also ``f1_micro``; for a
            regression ``pearson`` and ``mse``.
        per_label: Label -> precision, recall, F1 and number of texts; empty for a regression.
    """

    task: str
    problem: str
    labels: tuple[str, ...]
    n: int
    scores: Mapping[str, float]
    per_label: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Write the scores as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    def table(self) -> str:
        """Return the scores as Markdown, with a table of the labels."""
        what = "labeled tokens" if self.task == "TOKEN_CLS" else "texts"
        scores = ", ".join(f"{name} {value:.4f}" for name, value in self.scores.items())
        lines = [f"{scores} ({self.n} {what})"]
        if self.per_label:
            lines += ["", "| label | precision | recall | F1 | count |", "|---|---:|---:|---:|---:|"]
        for label, row in self.per_label.items():
            shares = " | ".join(f"{row[name]:.3f}" for name in ("precision", "recall", "f1"))
            lines.append(f"| {label.replace('|', '/')} | {shares} | {row['count']:.0f} |")
        return "\n".join(lines) + "\n"


def evaluate_classifier(
    model: Any,
    data: Any,
    *,
    base: Any = None,
    labels: LabelsLike | None = None,
    problem_type: str | None = None,
    tokenizer: Any = None,
    template: str | None = None,
    limit: int | None = None,
    cutoff: int = 512,
    revision: str | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
    progress: Progress = no_progress,
) -> ClassEvaluation:
    """Evaluate a classifier, a token classifier or a regression on labeled texts.

    Args:
        model: A PEFT model with a classification head, or the folder or Hub id of an adapter.
        data: Labeled texts, as in `read_texts`: a file, a dataset or a list.
        base: The backbone of an adapter by name; by default the base model of its config.
        labels: Names of the labels by index; by default those of files beside the adapter.
        problem_type: transformers' ``problem_type``; by default that of these files.
        tokenizer: Tokenizer, or its folder or Hub id; by default that of the backbone.
        template: Prompt template for records with an ``instruction``.
        limit: Texts at most, drawn by the seed; all if None.
        cutoff: Tokens of a text at most; the rest is cut off.
        revision: Revision of the adapter on the Hub.
        trust_remote_code: Whether transformers may run code of the backbone's repository, for an adapter by name.
        seed: Seed of the draw.
        progress: Shows the progress.

    Raises:
        LoraSuiteError: If it is no classifier, a label is unknown, the data is malformed, or scikit-learn is missing.
    """
    check_seed(seed)
    check_integer("cutoff", cutoff)
    _require_sklearn()
    load = LoadOptions(trust_remote_code=trust_remote_code)
    kind = adapter_task_type(model, revision, load)
    if kind not in CLASSIFIERS:
        raise LoraSuiteError("not a classifier", got=f"task_type {kind}", wanted=" or ".join(CLASSIFIERS))
    texts = read_texts(data, template, limit, seed)
    model, tokenizer = open_adapter(model, tokenizer, base, revision, load, labels=labels, problem_type=problem_type)
    task = infer_problem(model_task(model, kind), texts)
    padding = padding_of_model(model, tokenizer)
    rows = encode_texts(
        tokenizer, texts, per_token=task.per_token, padding=padding, limit=cutoff, where="the model"
    )  # fmt: skip
    places, wanted = place_labels(texts, rows, task)
    with restore_model(model):
        logits = class_logits(model.eval(), rows, padding, progress)
    index = [{position: line for line, position in enumerate(row.places)} for row in rows]
    return score_logits(torch.stack([logits[row][index[row][at]] for row, at in places]), wanted, task)


def score_logits(logits: Tensor, wanted: Tensor, task: Task) -> ClassEvaluation:
    """Return the scores of logits, (places, labels), for labels as `class_labels.place_labels` returns them."""
    from sklearn import metrics as sklearn_metrics

    metrics: Any = sklearn_metrics  # its annotations refuse numbers that its documentation asks for
    common = (task.kind, task.objective, task.labels, len(wanted))
    if task.objective == REGRESSION:
        mse = metrics.mean_squared_error(wanted.numpy(), logits.numpy())
        return ClassEvaluation(*common, {"pearson": _pearson(logits, wanted), "mse": float(mse)})
    several = task.objective == MULTI_LABEL
    found = (logits > 0).int().numpy() if several else logits.argmax(dim=1).numpy()
    truth = wanted.int().numpy() if several else wanted[:, 0].int().numpy()
    numbers = list(range(len(task.labels)))
    scores = {"accuracy": float(metrics.accuracy_score(truth, found))}
    for name, average in (("f1", "macro"), *((("f1_micro", "micro"),) if several else ())):
        scores[name] = float(metrics.f1_score(truth, found, labels=numbers, average=average, zero_division=0))
    columns = metrics.precision_recall_fscore_support(truth, found, labels=numbers, zero_division=0)
    per_label: dict[str, dict[str, float]] = {
        label: dict(zip(COLUMNS, map(float, row), strict=True))
        for label, row in zip(task.labels, zip(*columns, strict=True), strict=True)
    }
    return ClassEvaluation(*common, scores, per_label)


def _pearson(logits: Tensor, wanted: Tensor) -> float:
    """Return the mean correlation over the values; 0 where one side is constant."""
    left, right = (values.double() - values.double().mean(dim=0) for values in (logits, wanted))
    size = left.norm(dim=0) * right.norm(dim=0)
    return float(torch.where(size > 0, (left * right).sum(dim=0) / size.clamp(min=1e-30), 0.0).mean())


def _require_sklearn() -> None:
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        do = "pip install peft-lorasuite[evaluate]"
        raise LoraSuiteError("evaluation of classifiers needs scikit-learn, which is not installed", do=do) from error
