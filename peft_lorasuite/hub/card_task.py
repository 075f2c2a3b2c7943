"""What a model card says about the task of an adapter: the class that loads it, its labels, its pipeline tag."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class TaskNames(NamedTuple):
    """Names of a task: the ending of PEFT's auto class, and the pipeline tag of the Hub."""

    auto_class: str
    pipeline: str


CAUSAL = TaskNames("CausalLM", "text-generation")
NAMES = {
    "SEQ_CLS": TaskNames("SequenceClassification", "text-classification"),
    "TOKEN_CLS": TaskNames("TokenClassification", "token-classification"),
    "FEATURE_EXTRACTION": TaskNames("FeatureExtraction", "feature-extraction"),
}
"""Task type of PEFT -> names; all other types are causal language models."""


def pipeline_tag(report: Mapping[str, Any]) -> str:
    """Return the pipeline tag for the report of an upgrade."""
    return NAMES.get(_task(report).get("type", ""), CAUSAL).pipeline


def task_values(report: Mapping[str, Any], code: Callable[[Any], str]) -> dict[str, Any]:
    """Return the values of the card's template that depend on the task.

    Args:
        report: Values of ``lorasuite_report.json``.
        code: Formats untrusted text.
    """
    task = _task(report)
    labels = list(task.get("labels") or [])
    fitted = (report.get("facts") or {}).get(report["method"]["name"])
    measured = fitted.get("agreement") if isinstance(fitted, Mapping) else None
    return {
        "model_class": f"AutoPeftModelFor{NAMES.get(task.get('type', ''), CAUSAL).auto_class}",
        "num_labels": len(labels),
        "task": code(f"{task['type']}, {task.get('problem_type') or 'no problem_type'}") if labels else "",
        "labels": code(", ".join(map(str, labels))),
        "agreement": f"{float(measured):.1%}" if isinstance(measured, (int, float)) else "",
    }


def _task(report: Mapping[str, Any]) -> Mapping[str, Any]:
    return (report.get("facts") or {}).get("task") or {}
