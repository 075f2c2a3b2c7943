"""What a model card says about the task of an adapter: the class that loads it, its labels, its pipeline tag."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..text.summary import without_template


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
SAMPLES = 3
"""Sample answers of a card."""


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


TEMPLATES = {
    "old side": "The backbone has no chat template: the tokenizer of this repository has the template of the old side.",
    "option": "The tokenizer of this repository has the chat template that the adapter was made for.",
}
"""Origin of a chat template that is not the backbone's own -> sentence of the card."""


def chat_values(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return whether the adapter was made from conversations, and a sentence about another chat template."""
    facts = (report.get("facts") or {}).get("chat") or {}
    return {"chat": bool(facts), "chat_template": TEMPLATES.get(str(facts.get("new_template")), "")}


def sample_rows(report: Mapping[str, Any], code: Callable[[Any], str]) -> list[list[str]]:
    """Return the first prompts whose answers the report has, each with the three answers."""
    found = without_template((report.get("facts") or {}).get("samples") or [])
    return [[code(one[name]) for name in ("prompt", "base", "upgraded", "old")] for one in found[:SAMPLES]]


def _task(report: Mapping[str, Any]) -> Mapping[str, Any]:
    return (report.get("facts") or {}).get("task") or {}
