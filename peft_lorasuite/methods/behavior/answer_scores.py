"""How an adapter starts the answers to prompts: how much it changes their first tokens, and how sure it is of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ...models.activations import pad_batch
from ...models.backbone import Backbone
from ...models.forward import logits_at, model_inputs
from ...models.generation import encode_prompts, generate_answers
from ...progress import Progress, no_progress

STEPS = 4
"""Tokens of an answer that are read."""
BATCH = 16
CHANGED = 1.0
"""Change, in nats, that counts in full. More says little: a base model may know the adapter's format, and no other."""
SMALLEST_ENTROPY = 0.1
"""Entropies below this, in nats, count alike."""


class AnswerScore(NamedTuple):
    """How an adapter starts an answer, or many of them on average.

    Attributes:
        change: Mean KL divergence of the old adapted model from the old model at the first tokens, in nats.
        entropy: Mean entropy of the old adapted model there, in nats.
        answered: Share of the answers that are not empty; the others are not in the means.
    """

    change: float
    entropy: float
    answered: float = 1.0

    @property
    def sureness(self) -> float:
        """How sure the adapter is where it changes anything: higher is better. Compares formats.

        Where it says nothing to most prompts, the few other answers are sure, but not those of its training.
        """
        return self.answered * min(self.change / CHANGED, 1.0) / (self.entropy + SMALLEST_ENTROPY)

    @property
    def gain(self) -> float:
        """The change, up to `CHANGED`, times the adapter's confidence, from 0 to 1. Compares prompts of one format.

        Without the bound those prompts win that the old model was sure to answer in another way, not those of the task.
        """
        return self.answered * min(self.change, CHANGED) * math.exp(-self.entropy)

    @classmethod
    def mean(cls, scores: Sequence[AnswerScore]) -> AnswerScore:
        """Return the means of the scores of answers that are not empty."""
        found = [one for one in scores if one.answered]
        if not found:
            return NO_ANSWER
        change, entropy = (sum(values) / len(found) for values in ([one[n] for one in found] for n in (0, 1)))
        return cls(change, entropy, len(found) / len(scores))


NO_ANSWER = AnswerScore(0.0, 0.0, 0.0)


@torch.inference_mode()
def score_answers(
    model: Any, backbone: Backbone, texts: Sequence[str], progress: Progress = no_progress
) -> list[AnswerScore]:
    """Let the adapted model begin an answer to every prompt, and read it with and without the adapter.

    Args:
        model: A PEFT model that is not merged: its adapter is disabled for the second reading.
        backbone: The old backbone.
        texts: Prompts as the model reads them.
        progress: Shows the progress.
    """
    answers = generate_answers(model, backbone, texts, length=STEPS, progress=progress)
    prompts = encode_prompts(backbone, texts, STEPS)
    rows = [[*ids, *written.ids] for ids, (_, written) in zip(prompts, answers, strict=True)]
    counts = [len(written.states) for _, (_, written) in zip(prompts, answers, strict=True)]
    scores: dict[int, AnswerScore] = {}
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    for start in progress("comparing with the plain model", range(0, len(order), BATCH)):
        chosen = order[start : start + BATCH]
        batch = {name: one.to(model.device) for name, one in pad_batch([rows[number] for number in chosen]).items()}
        first = min(len(rows[number]) - counts[number] for number in chosen)
        keep = torch.arange(first, batch["input_ids"].shape[1], device=model.device)
        inputs = model_inputs(model, **batch)
        _, after = logits_at(model, inputs, keep)
        with model.disable_adapter():
            _, before = logits_at(model, inputs, keep)
        for line, number in enumerate(chosen):
            last = len(rows[number]) - first
            found = _compare(*(one[line, last - counts[number] : last] for one in (after, before)))
            # a model may be sure to say nothing to what it does not know: no prompt of a task
            scores[number] = found if answers[number][1].ids else NO_ANSWER
    return [scores[number] for number in range(len(texts))]


def _compare(after: torch.Tensor, before: torch.Tensor) -> AnswerScore:
    """Return the score of logits, (positions, tokens)."""
    adapted, plain = after.float().log_softmax(-1), before.float().log_softmax(-1)
    change = (adapted.exp() * (adapted - plain)).sum(-1).mean()
    return AnswerScore(float(change), float(-(adapted.exp() * adapted).sum(-1).mean()))
