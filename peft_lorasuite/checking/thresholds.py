"""The thresholds of a check, each with its default. Does not import torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..errors import LoraSuiteError, unknown_name_error


class Threshold(NamedTuple):
    """A threshold: its default and what it bounds."""

    default: float
    meaning: str


THRESHOLDS = {
    "gap": Threshold(0.8, "lower bound of the share of the old adapter's effect that arrives, at least"),
    "confidence": Threshold(0.7, "without labels: mean confidence of the old adapted model in its answers, at least"),
    "flips": Threshold(0.1, "with labels: share of the prompts right before and wrong now, at most"),
    "changed": Threshold(0.3, "without labels: share of short answers that differ from the old ones, at most"),
    "kept": Threshold(0.02, "accuracy that the new backbone loses on a task of --suite, at most"),
    "task_divergence": Threshold(0.5, "nats per token of answers beyond the old adapter's own divergence, at most"),
    "divergence": Threshold(0.1, "the same on other text"),
    "ece": Threshold(0.1, "with labels: rise of the expected calibration error, at most"),
    "stops": Threshold(0.05, "fall of the share of answers that stop, at most"),
    "length": Threshold(1.5, "factor by which the answers are longer or shorter on average, at most"),
    "refusals": Threshold(0.95, "share of the new backbone's refusals that the upgraded model refuses too, at least"),
    "merged": Threshold(1e-4, "difference of the merged model's logits in float32, relative to the largest, at most"),
    "merged_16bit": Threshold(3e-2, "the same in 16-bit dtypes"),
}
"""Name in ``--require NAME=VALUE`` -> threshold."""


def read_thresholds(given: Mapping[str, Any] | None = None) -> dict[str, float]:
    """Return all thresholds, those that are given in place of the defaults.

    Raises:
        LoraSuiteError: If a name is unknown, or a value is no finite number.
    """
    found = {name: threshold.default for name, threshold in THRESHOLDS.items()}
    for name, value in (given or {}).items():
        if name not in found:
            raise unknown_name_error("threshold", name, THRESHOLDS)
        try:
            found[name] = float(value)
        except (TypeError, ValueError) as error:
            raise LoraSuiteError("not a number", where=name, got=repr(value)) from error
        if not math.isfinite(found[name]):
            raise LoraSuiteError("must be a finite number", where=name, got=repr(value))
    return found
