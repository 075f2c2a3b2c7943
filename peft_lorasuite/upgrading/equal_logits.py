"""The proof that an adapter was re-keyed without loss: both adapted models give equal logits on a few tokens."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor

from ..adapters.adapter import Adapter
from ..adapters.peft_model import load_with_adapter
from ..errors import LoraSuiteError
from ..methods.base import MethodInput
from ..models.backbone import Backbone
from ..models.dtype import available_memory
from ..models.quantized import quantization
from ..text.calibration import calibration_texts

TOKENS = 32
TOLERANCE, LOW_PRECISION = 1e-4, 3e-2
"""Largest difference of equal logits, relative to the largest one: in float32, and where weights or states were
rounded to a 16-bit dtype."""


def prove(inputs: MethodInput, result: Adapter, facts: Mapping[str, Any], options: Any) -> dict[str, Any]:
    """Compare the logits of the old and the new adapted model.

    Returns:
        Facts for the report: ``rekey`` with the figures under ``logits``, or with the reason why they were not compared
        under ``not_compared``; and the prediction.
    """
    reason = "prove=false" if not options.prove else _obstacle(inputs)
    found: dict[str, Any] = {"not_compared": reason}
    if not reason:
        try:
            found = {"logits": _compare(inputs, result)}
        except LoraSuiteError as error:
            found = {"not_compared": str(error)}
    equal = found["logits"]["equal"] if "logits" in found else True
    because = "the same weights; " + describe(found)
    prediction = {"verdict": "holds" if equal else "doubtful", "expected_gap_recovered": 1.0, "because": because}
    return {"rekey": {**facts["rekey"], **found}, "prediction": prediction}


def describe(found: Mapping[str, Any]) -> str:
    """Describe the comparison of the logits in a few words."""
    if "logits" not in found:
        return f"logits not compared: {found['not_compared']}"
    logits = found["logits"]
    words = "equal" if logits["equal"] else "not equal"
    return (
        f"logits of both adapted models {words}: they differ by at most {logits['difference']:.1e} of"
        f" {logits['largest']:.3g} on {logits['tokens']} tokens"
    )


def _obstacle(inputs: MethodInput) -> str:
    """Return why one of the backbones is not run; empty if both can be."""
    for role, backbone in (("old", inputs.old), ("new", inputs.new)):
        if backbone is None:
            return f"the {role} backbone was not passed"
        if quantization(backbone.config) is not None:
            return f"the {role} backbone is quantized"
        if short := _lacking_memory(backbone):
            return f"the {role} backbone {short}"
    return ""


def _lacking_memory(backbone: Backbone) -> str:
    """Return that a backbone needs more memory than there is; empty if it fits, is loaded, or is placed by a map."""
    if backbone.in_memory or backbone.device_map is not None:
        return ""
    needed = backbone.arch.parameter_count() * backbone.running_dtype().dtype.itemsize
    free = available_memory()
    return f"needs {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free" if needed > 0.8 * free else ""


def _compare(inputs: MethodInput, result: Adapter) -> dict[str, Any]:
    old, new = inputs.backbones("the comparison of logits")
    size = min(old.arch.vocabulary, new.arch.vocabulary)
    ids = old.tokenizer(calibration_texts(None)[0], add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[number for number in ids if number < size][:TOKENS]])
    old, new = _in_one_dtype(old, new)
    left, right = _logits(old, inputs.adapter, ids), _logits(new, result, ids)
    columns = min(left.shape[-1], right.shape[-1])  # a vocabulary may be padded
    difference = float((left[..., :columns] - right[..., :columns]).abs().max())
    largest = float(left.abs().max())
    rounded = old.stored_dtype != new.stored_dtype  # also where a CPU runs both in float32
    exact = not rounded and all(one.running_dtype().compute.itemsize > 2 for one in (old, new))
    return {
        "difference": difference, "largest": largest, "tokens": ids.shape[1],
        "equal": difference <= (TOLERANCE if exact else LOW_PRECISION) * largest,
    }  # fmt: skip


def _in_one_dtype(old: Backbone, new: Backbone) -> tuple[Backbone, Backbone]:
    """Return both backbones in the coarser of their dtypes: copies in different ones differ by the rounding."""
    dtypes = [one.running_dtype().dtype for one in (old, new)]
    if dtypes[0] == dtypes[1]:
        return old, new
    if old.in_memory or new.in_memory:
        raise LoraSuiteError("the loaded models have different dtypes", got=" and ".join(map(str, dtypes)))
    coarse = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    old, new = copy(old), copy(new)
    old.dtype = new.dtype = coarse
    return old, new


@torch.no_grad()
def _logits(backbone: Backbone, adapter: Adapter, ids: Tensor) -> Tensor:
    with load_with_adapter(backbone, adapter) as model:
        found = model(input_ids=ids.to(model.device))
        return (found.logits if hasattr(found, "logits") else found[0]).float().cpu()
