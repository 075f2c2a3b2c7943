"""Likelihood of answers with and without an adapter, by teacher forcing, and what is computed from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..methods.behavior.positions import sample_text, tokenize
from ..methods.behavior.shifts import confidence_of
from ..models.activations import length_batches
from ..models.backbone import Backbone
from ..models.forward import logits_at, model_inputs
from ..models.generation import Turn
from ..progress import Progress, no_progress
from ..text.vocabulary import pad_token_id
from ..training.encoding import IGNORE_INDEX, Encoded, batch

RESAMPLES = 1000
LEVEL = 0.05
"""Quantile of the resamples that is the lower bound."""
BINS = 10
"""Bins of the expected calibration error."""
TEXT_TOKENS = 2048
"""Tokens of the built-in text that are read."""


class Reading(NamedTuple):
    """What a model gives for the answer to one prompt, summed over its tokens, in nats.

    Attributes:
        nll: Negative log-likelihood with the adapter.
        base: The same without it.
        tokens: Number of tokens.
        divergence: KL divergence of the adapted model from the model without the adapter.
        confidence: Confidence of the adapted model, from 0 to 1 at each token (see `shifts.confidence_of`).
    """

    nll: float
    base: float
    tokens: int
    divergence: float
    confidence: float


def turn_row(backbone: Backbone, turn: Turn) -> Encoded:
    """Tokenize a generated answer; its tokens, and the token that ended it, have a loss."""
    found = tokenize(backbone, turn)
    return Encoded((*found.ids, *([found.end] if found.ended else [])), found.first + 1)


def text_rows(backbone: Backbone, seed: int) -> list[Encoded]:
    """Return paragraphs of the built-in text; all tokens but the first of each have a loss."""
    return [Encoded(one.ids, 1) for one in sample_text(backbone, TEXT_TOKENS, seed)]


@torch.inference_mode()
def read_rows(
    model: Any, backbone: Backbone, rows: Sequence[Encoded], progress: Progress = no_progress
) -> list[Reading]:
    """Read tokenized answers with and without the adapter of a PEFT model that is not merged."""
    padding, found = pad_token_id(backbone.tokenizer, backbone.arch.vocabulary), {}
    for numbers in progress("reading answers", length_batches(rows)):
        chosen = [rows[number] for number in numbers]
        inputs = {name: one.to(model.device) for name, one in batch(chosen, padding=padding).items()}
        first = min(min(row.start, len(row.ids) - 1) for row in chosen) - 1
        labels = inputs.pop("labels")[:, first + 1 :]
        keep = torch.arange(first, first + labels.shape[1], device=model.device)
        inputs = model_inputs(model, **inputs, use_cache=False)
        _, after = logits_at(model, inputs, keep)
        with model.disable_adapter():
            _, before = logits_at(model, inputs, keep)
        for line, number in enumerate(numbers):
            truth = labels[line].to(after.device)
            inside = truth != IGNORE_INDEX
            found[number] = _read(after[line][inside], before[line][inside], truth[inside])
    return [found[number] for number in range(len(rows))]


def _read(after: Tensor, before: Tensor, truth: Tensor) -> Reading:
    """Return the reading of logits, (tokens, vocabulary), for the tokens that follow."""
    adapted, plain = after.float().log_softmax(-1), before.float().log_softmax(-1)
    nll, base = (-float(one.gather(1, truth[:, None]).sum()) for one in (adapted, plain))
    entropy = -(adapted.exp() * adapted).sum(-1)
    divergence = float((plain.exp() * (plain - adapted)).sum())
    return Reading(nll, base, len(truth), divergence, float(confidence_of(entropy).sum()))


def per_token(readings: Sequence[Reading], name: str) -> float:
    """Return the mean of an attribute of readings over all tokens."""
    return sum(getattr(one, name) for one in readings) / max(sum(one.tokens for one in readings), 1)


def share_with_bound(parts: Sequence[float], wholes: Sequence[float], seed: int) -> tuple[float, float]:
    """Return the sum of ``parts`` over that of ``wholes``, and its lower bound by a bootstrap over the prompts.

    The bound is the `LEVEL` quantile of `RESAMPLES` resamples: one-sided, of 95 %. A resample whose wholes add up to
    nothing counts as 0.
    """
    part, whole = (torch.tensor(values, dtype=torch.float64) for values in (parts, wholes))
    drawn = torch.randint(len(part), (RESAMPLES, len(part)), generator=torch.Generator().manual_seed(seed))
    sums, totals = part[drawn].sum(dim=1), whole[drawn].sum(dim=1)
    shares = torch.where(totals > 0, sums / totals.clamp_min(1e-12), 0.0)
    return float(part.sum() / whole.sum()), float(shares.quantile(LEVEL))


def calibration_error(confidences: Sequence[float], right: Sequence[bool]) -> float:
    """Return the expected calibration error of answers in `BINS` bins of equal width, from 0 to 1."""
    bins: dict[int, list[tuple[float, bool]]] = {}
    for confidence, one in zip(confidences, right, strict=True):
        bins.setdefault(min(int(confidence * BINS), BINS - 1), []).append((confidence, one))
    gaps = (abs(sum(sure - one for sure, one in members)) for members in bins.values())
    return sum(gaps) / max(len(right), 1)
