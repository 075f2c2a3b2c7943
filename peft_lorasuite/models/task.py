"""What a model is used for: the transformers class that loads it, its labels, and the module that classifies."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn

from ..compat import body, body_name
from ..errors import LoraSuiteError, unknown_name_error

CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "FEATURE_EXTRACTION": "AutoModel",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}
"""PEFT's task type -> class of transformers; all other types run as a causal language model."""
REGRESSION, MULTI_LABEL, SINGLE_LABEL = "regression", "multi_label_classification", "single_label_classification"
PROBLEMS = (SINGLE_LABEL, MULTI_LABEL, REGRESSION)
"""Values of transformers' ``problem_type``."""
CLASSIFIERS = ("SEQ_CLS", "TOKEN_CLS")
"""Task types with a classification head."""
HEADS = ("score", "classifier")
"""Names of classification heads in transformers, as PEFT knows them."""

LINE_OR_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
"""Characters that would break the lines of a table."""

LabelsLike: TypeAlias = "Sequence[str] | Mapping[Any, str]"
"""Names of labels by index, or a mapping of indices to names (``id2label``)."""


@dataclass(frozen=True)
class Task:
    """The task of an adapter or a loaded model.

    Attributes:
        kind: PEFT's task type.
        labels: Names of the classes or, for a regression, of the values; empty without a classification head.
        problem: transformers' ``problem_type``; empty if it is not known.
        reads_head: Whether the language-model head is read; without it, checkpoints that have none can be loaded.
    """

    kind: str = "CAUSAL_LM"
    labels: tuple[str, ...] = ()
    problem: str = ""
    reads_head: bool = True

    @property
    def classifies(self) -> bool:
        """Whether the model has a classification head."""
        return self.kind in CLASSIFIERS

    @property
    def per_token(self) -> bool:
        """Whether every token is classified rather than the whole text."""
        return self.kind == "TOKEN_CLS"

    @property
    def causal(self) -> bool:
        """Whether the model is a causal language model."""
        return not self.classifies and self.kind != "FEATURE_EXTRACTION"

    @property
    def running(self) -> Task:
        """The task that its model is run with: embeddings are read from the decoder of a causal language model."""
        return DECODER if self.kind == "FEATURE_EXTRACTION" else self

    @property
    def objective(self) -> str:
        """The problem type, one of `PROBLEMS`; if it is not known, the one that transformers assumes."""
        return self.problem or (REGRESSION if len(self.labels) == 1 else SINGLE_LABEL)

    @property
    def rewards(self) -> bool:
        """Whether it is a reward model: one value for a text, and no problem type that says otherwise."""
        return self.kind == "SEQ_CLS" and len(self.labels) == 1 and not self.problem

    @property
    def auto_class(self) -> Any:
        """The class of transformers that loads the model."""
        import transformers

        return getattr(transformers, CLASSES.get(self.kind, CLASSES["CAUSAL_LM"]))

    def with_labels(self, labels: Any, problem: str | None, rows: int, where: str) -> Task:
        """Return the task with other labels and problem type.

        Args:
            labels: Names by index: a sequence, a mapping of indices to names, or None to keep them.
            problem: transformers' ``problem_type``, or None to keep it.
            rows: Number of outputs of the head.
            where: Origin of the labels, for error messages.

        Raises:
            LoraSuiteError: If the labels are malformed or of another number, or the problem type is unknown.
        """
        if problem is not None and problem not in PROBLEMS:
            raise unknown_name_error("problem type", str(problem), PROBLEMS)
        if problem == SINGLE_LABEL and rows == 1:
            raise LoraSuiteError("a head with one output cannot classify", where=where, got=problem, wanted=REGRESSION)
        names = self.labels if labels is None else read_labels(labels, where)
        if len(names) != rows:
            raise LoraSuiteError(
                "the number of labels differs from the rows of the classification head", where=where,
                got=f"{len(names)} labels", wanted=rows, do="pass the labels that it was trained with",
            )  # fmt: skip
        return replace(self, labels=names, problem=self.problem if problem is None else problem)

    def facts(self) -> dict[str, Any]:
        """Return JSON values for reports and records."""
        return {"type": self.kind, "labels": list(self.labels), "problem_type": self.problem or None}

    def config(self, config: Any, padding: int | None = None) -> Any:
        """Return a copy of a config with the labels of the task and, where it has no padding token, with ``padding``.

        Classifiers read their result at the last token that is not the padding token.
        """
        changed = copy.deepcopy(config)
        if self.classifies:
            changed.id2label = dict(enumerate(self.labels))
            changed.label2id = {label: number for number, label in enumerate(self.labels)}
            changed.problem_type = self.problem or None
        if padding_token(changed) is None:
            changed.get_text_config().pad_token_id = padding
        return changed


def padding_token(config: Any) -> int | None:
    """Return the padding token of a config, or None if it has none or one outside of the vocabulary."""
    text = config.get_text_config()
    token = getattr(text, "pad_token_id", None)
    return token if isinstance(token, int) and 0 <= token < text.vocab_size else None


CAUSAL = Task()
DECODER = Task(reads_head=False)
"""The decoder layers of a causal language model, whose head is not read."""


class HeadPlace(NamedTuple):
    """A classification head in a model: the name of the module, and whether it has a bias."""

    name: str
    bias: bool


def model_task(model: Any, kind: str) -> Task:
    """Return the task of a loaded classifier, by its config."""
    names = getattr(model.config, "id2label", None) or {}
    labels = tuple(str(names[number]) for number in sorted(names))
    return Task(kind, labels, getattr(model.config, "problem_type", None) or "")


def numbered_labels(count: int) -> tuple[str, ...]:
    """Return the names that transformers gives to labels without names."""
    return tuple(f"LABEL_{number}" for number in range(count))


def read_labels(labels: Any, where: str) -> tuple[str, ...]:
    """Read labels: a sequence of names, or a mapping of indices to names (``id2label``).

    Raises:
        LoraSuiteError: If they are malformed, or two have the same name.
    """
    if isinstance(labels, Mapping):
        try:
            ordered = {int(number): name for number, name in labels.items()}
        except (TypeError, ValueError, OverflowError):
            ordered = {}
        names: tuple[Any, ...] = tuple(ordered.get(number) for number in range(len(labels)))
    else:
        names = tuple(labels) if isinstance(labels, Iterable) and not isinstance(labels, str) else ()
    if (
        not names
        or len(set(map(repr, names))) < len(names)
        or not all(isinstance(name, str) and name and not LINE_OR_CONTROL.search(name) for name in names)
    ):
        raise LoraSuiteError(
            "malformed labels", where=where, got=repr(labels)[:80],
            wanted="distinct names without control characters, one for each class",
            do="pass them (--labels, labels=)",
        )  # fmt: skip
    return names


def find_head(config: Any, task: Task) -> HeadPlace:
    """Return where the classification head is in a model of this config.

    Raises:
        LoraSuiteError: If transformers has no such class for the family.
    """
    shell = empty_model(config, task)
    name = head_name(shell)
    return HeadPlace(name, getattr(shell, name).bias is not None)


def head_name(model: Any) -> str:
    """Return the name of a classifier's head."""
    return next(name for name in HEADS if isinstance(getattr(model, name, None), nn.Linear))


def empty_model(config: Any, task: Task) -> Any:
    """Return a model of the task's class on the meta device.

    Raises:
        LoraSuiteError: If transformers has no such class for the family.
    """
    if type(config) not in task.auto_class._model_mapping:
        kind = config.model_type
        raise LoraSuiteError(
            f"transformers has no {task.auto_class.__name__} for {kind!r}", wanted="a family that has it",
            do="choose another new backbone",
        )  # fmt: skip
    with torch.device("meta"):
        return task.auto_class.from_config(task.config(config))


def adapt_model(model: Any, task: Task, padding: int | None) -> Any:
    """Return a loaded model as one of the task's class; the decoder is shared, and the head is new where it differs.

    Args:
        model: The loaded model, of any class of its family.
        task: The task.
        padding: Padding token, where the config has none.

    Raises:
        LoraSuiteError: If a causal language model is needed, and the model has no language-model head.
    """
    if task.kind == "FEATURE_EXTRACTION":
        return body(model)
    if not task.classifies:
        if task.reads_head and getattr(model, "get_output_embeddings", lambda: None)() is None:
            raise LoraSuiteError(
                "the model must be a causal language model", got=type(model).__name__,
                wanted="a transformers model with its head", do="load it with AutoModelForCausalLM",
            )  # fmt: skip
        return model
    shell = empty_model(model.config, task)
    same = isinstance(model, type(shell)) and model.config.id2label == shell.config.id2label
    if same and padding_token(model.config) is not None:
        return model
    name = head_name(shell)
    head = getattr(shell, name)
    setattr(shell, body_name(shell), body(model))
    like = {"device": model.device, "dtype": model.dtype}
    setattr(shell, name, nn.Linear(head.in_features, head.out_features, bias=head.bias is not None, **like))
    shell.config = task.config(model.config, padding)
    return shell.eval()
