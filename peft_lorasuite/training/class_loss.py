"""Losses of classifiers and regressions per text or token, toward labels or toward the logits of a teacher."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ..models.task import MULTI_LABEL, REGRESSION


def teacher_losses(
    logits: Float[Tensor, "places labels"], wanted: Float[Tensor, "places labels"], objective: str
) -> Float[Tensor, " places"]:
    """Return ``KL(wanted || logits)`` in nats; the squared error for a regression.

    With several labels it is the sum over the labels, each of which is a choice between yes and no.

    Args:
        logits: Logits.
        wanted: Logits of the teacher.
        objective: transformers' ``problem_type``.
    """
    if objective == REGRESSION:
        return (logits - wanted).pow(2).mean(dim=1)
    if objective == MULTI_LABEL:
        logits, wanted = (torch.stack([values, torch.zeros_like(values)], dim=-1) for values in (logits, wanted))
    after, target = logits.log_softmax(-1), wanted.log_softmax(-1)
    each = (target.exp() * (target - after)).sum(-1)
    return each.sum(-1) if objective == MULTI_LABEL else each


def label_losses(
    logits: Float[Tensor, "places labels"], labels: Float[Tensor, "places columns"], objective: str
) -> Float[Tensor, " places"]:
    """Return transformers' loss of the ``problem_type``.

    Args:
        logits: Logits.
        labels: Index of the class in one column; 0 or 1 per label; or the values of a regression.
        objective: transformers' ``problem_type``.
    """
    if objective == REGRESSION:
        return (logits - labels).pow(2).mean(dim=1)
    if objective == MULTI_LABEL:
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(dim=1)
    return torch.nn.functional.cross_entropy(logits, labels[:, 0].long(), reduction="none")


def agreement(logits: Tensor, wanted: Tensor, objective: str) -> float:
    """Return the share of places with the same class, or of equal labels; for a regression the share explained."""
    if objective == REGRESSION:
        total = (wanted - wanted.mean(dim=0)).pow(2).sum().clamp(min=1e-30)
        return float((1 - (logits - wanted).pow(2).sum() / total).clamp(min=0))
    if objective == MULTI_LABEL:
        return float(((logits > 0) == (wanted > 0)).double().mean())
    return float((logits.argmax(dim=1) == wanted.argmax(dim=1)).double().mean())
