"""Classification heads in adapters, and the task that they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ..arch.spec import Architecture
from ..errors import LoraSuiteError
from ..io.source import Source
from ..linalg.lowrank import check_values
from ..models.backbone import Backbone
from ..models.task import HEADS, HeadPlace, Task, numbered_labels
from .key_names import parse_names
from .peft_format import PREFIX, RECORD, REPORT


@dataclass(frozen=True, eq=False)
class ClassHead:
    """A classification head: ``logits = weight @ state + bias``.

    Attributes:
        weight: ``(labels, hidden)``, float32.
        bias: ``(labels,)``, or None.
        names: Names of the tensors that it was read from.
    """

    weight: Float[Tensor, "labels hidden"]
    bias: Tensor | None = None
    names: tuple[str, ...] = ()

    def tensors(self, place: HeadPlace) -> dict[str, Tensor]:
        """Return the PEFT tensors of the head; a bias of zeros where the model has one and the head has none."""
        tensors = {f"{PREFIX}{place.name}.weight": self.weight}
        if place.bias:
            bias = self.weight.new_zeros(len(self.weight)) if self.bias is None else self.bias
            tensors[f"{PREFIX}{place.name}.bias"] = bias
        return tensors


def is_head(module: str) -> bool:
    """Return whether a module is a classification head, by its path."""
    return module.rpartition(".")[2] in HEADS


def read_head(used: Mapping[str, Tensor], names: tuple[str, ...], arch: Architecture, *, where: str) -> ClassHead:
    """Read a classification head that was trained in full (``modules_to_save``).

    Args:
        used: Ending -> tensor of the module.
        names: Names of these tensors.
        arch: Architecture of the backbone.
        where: Place for error messages.

    Raises:
        LoraSuiteError: If a tensor is missing, does not fit the backbone, or has values out of range.
    """
    weight, bias = used.get("weight"), used.get("bias")
    if weight is None:
        raise LoraSuiteError(
            "the classification head has no weight", where=where, got=", ".join(used),
            do="train the head in full (modules_to_save), as PEFT does for this task type",
        )  # fmt: skip
    if weight.ndim != 2 or weight.shape[1] != arch.hidden or not len(weight):
        raise LoraSuiteError(
            "the classification head does not fit the old backbone", where=where, got=tuple(weight.shape),
            wanted=f"(labels, {arch.hidden})", do="pass the backbone that it was trained on (--from, source_model=)",
        )  # fmt: skip
    if bias is not None and tuple(bias.shape) != (len(weight),):
        raise LoraSuiteError(
            "weight and bias of the classification head differ in their labels", where=where, got=tuple(bias.shape),
            wanted=(len(weight),), do="fetch the adapter again",
        )  # fmt: skip
    check_values(*(tensor for tensor in (weight, bias) if tensor is not None), where=where)
    return ClassHead(weight.float(), None if bias is None else bias.float(), names)


def saved_head(tensors: Mapping[str, Tensor], arch: Architecture, *, where: str) -> ClassHead | None:
    """Return the classification head among the tensors of an adapter, if there is one; see `read_head`."""
    keys = {name: key for name, key in parse_names(tensors, arch).items() if not key.reason and is_head(key.module)}
    used = {key.ending: tensors[name] for name, key in keys.items()}
    return read_head(used, tuple(keys), arch, where=where) if keys else None


def adapter_task(config: Mapping[str, Any], head: ClassHead | None, *, where: str) -> Task:
    """Return the task of an adapter, with numbered labels.

    Without a task type, the class that PEFT names or a head decides: in transformers those of token classifiers have a
    bias.

    Raises:
        LoraSuiteError: If a classifier has no head, or another adapter has one.
    """
    kind = config.get("task_type") or _kind_of_class(config)
    if kind == "QUESTION_ANS":
        raise LoraSuiteError(
            "adapters that mark answers in a text are not transferred", where=where, got=f"task_type {kind}",
            do="train it on the new backbone",
        )  # fmt: skip
    if head is None:
        if kind in ("SEQ_CLS", "TOKEN_CLS"):
            raise LoraSuiteError(
                f"the adapter is for {kind} and has no classification head", where=where,
                wanted=" or ".join(f"{name}.weight" for name in HEADS), do="save it again with PEFT",
            )  # fmt: skip
        return Task(kind or "CAUSAL_LM")
    if kind is None:
        kind = "SEQ_CLS" if head.bias is None else "TOKEN_CLS"
    if kind not in ("SEQ_CLS", "TOKEN_CLS"):
        raise LoraSuiteError(
            f"the adapter is for {kind} and has a classification head", where=where, wanted="SEQ_CLS or TOKEN_CLS",
            do="fix task_type in the config",
        )  # fmt: skip
    return Task(kind, numbered_labels(len(head.weight)))


def _kind_of_class(config: Mapping[str, Any]) -> str | None:
    """Return the task type by the class of the base model, which PEFT saves for adapters without a task type."""
    mapping = config.get("auto_mapping")
    name = mapping.get("base_model_class") if isinstance(mapping, Mapping) else None
    endings = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS",
               "Model": "FEATURE_EXTRACTION", "ForQuestionAnswering": "QUESTION_ANS"}  # fmt: skip
    return next((kind for ending, kind in endings.items() if isinstance(name, str) and name.endswith(ending)), None)


STORED = {REPORT: ("facts", "task"), RECORD: ("task",)}
"""File -> keys under which it has the labels."""


def stored_labels(task: Task, source: Source, old: Backbone | None) -> Task:
    """Return the task with labels and problem type from files beside the adapter, or from the old backbone's config.

    Trainer and PEFT save neither. The report of an upgrade and the record of a fine-tuning have both; a saved config of
    the model may have them.

    Raises:
        LoraSuiteError: If the labels of a file are malformed, or of another number than the rows of the head.
    """
    rows = len(task.labels)
    for file in (REPORT, RECORD, "config.json"):
        values: Any = source.read_json(file) if source.fetch(file) is not None else None
        for key in STORED.get(file, ()):
            values = values.get(key) if isinstance(values, dict) else None
        if not isinstance(values, dict):
            continue
        labels, problem = values.get("id2label") or values.get("labels"), values.get("problem_type")
        if labels or problem:
            return task.with_labels(labels or None, problem or None, rows, source.full_name(file))
    config = old.config if old is not None else None
    names = getattr(config, "id2label", None) or {}
    if len(names) == rows and any(not str(name).startswith("LABEL_") for name in names.values()):
        return task.with_labels(names, getattr(config, "problem_type", None), rows, repr(old))
    return task
