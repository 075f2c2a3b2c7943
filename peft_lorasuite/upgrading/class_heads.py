"""The classification head of the result: fitted by the method, or mapped from that of the adapter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..adapters.adapter import Adapter
from ..adapters.class_head import ClassHead
from ..errors import LoraSuiteError
from ..methods.base import MethodInput, MethodResult
from ..models.backbone import Backbone
from ..models.stored_names import find_stored
from ..models.task import find_head
from .report import TRANSFERRED
from .token_tables import map_rows


def add_task(
    result: Adapter, inputs: MethodInput, method_result: MethodResult, method: str
) -> tuple[Adapter, dict[str, Any], dict[str, str]]:
    """Add the adapter's task to the result and, for a classifier, a head.

    Args:
        result: The new adapter.
        inputs: What the method was given.
        method_result: What the method returned.
        method: Its name; `copy` crops or pads the head rather than mapping it.

    Returns:
        The result; facts for the report; and the fates of the head's tensors.

    Raises:
        LoraSuiteError: If the new backbone has no such class, or the rank is too low for a fitted head.
    """
    source = inputs.adapter
    result = replace(result, task=source.task)
    if source.head is None:
        return result, {} if source.task.causal else {"task": source.task.facts()}, {}
    old, new = inputs.backbones("an adapter with a classification head")
    needed = max((one.rank for one in method_result.updates.values() if one.norm()), default=0)
    if method == "transplant" and result.rank < needed:
        raise LoraSuiteError(
            "the fitted head reads more components than the rank", where="rank", got=result.rank,
            wanted=f"at least {needed}", do="increase the rank, or leave it out",
        )  # fmt: skip
    place, head = find_head(new.config, source.task), method_result.head
    if head is None:
        head = _resized(source.head, new.arch.hidden) if method == "copy" else _mapped(source.head, old, new, inputs)
    return result.with_head(head, place), {"task": source.task.facts()}, dict.fromkeys(source.head.names, TRANSFERRED)


def _mapped(head: ClassHead, old: Backbone, new: Backbone, inputs: MethodInput) -> ClassHead:
    """Map a head to the new final state; the bias takes up the difference of the final norms' biases."""
    weight = map_rows("head", head.weight, old, new, inputs.map.hidden, inputs.map.inverse)
    if head.bias is None:
        return ClassHead(weight)
    bias = head.bias.clone()
    if old.arch.norm == new.arch.norm == "layer":
        bias += head.weight @ _shift(old) - weight @ _shift(new)
    return ClassHead(weight, bias)


def _shift(backbone: Backbone) -> Tensor:
    """Return the bias of the final LayerNorm, which some families leave out (Cohere)."""
    path = f"{backbone.arch.final_norm}.bias"
    stored = find_stored(path, backbone.weights, backbone.arch)
    return torch.zeros(backbone.arch.hidden) if stored is None else backbone.tensor(path)


def _resized(head: ClassHead, hidden: int) -> ClassHead:
    """Crop the head, or pad it with zeros, to the new hidden size."""
    weight: Tensor = head.weight.new_zeros(len(head.weight), hidden)
    width = min(hidden, head.weight.shape[1])
    weight[:, :width] = head.weight[:, :width]
    return ClassHead(weight, head.bias)
