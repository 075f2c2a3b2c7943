"""What an adapter knows beyond the prompts at hand: recombined prompts that the old adapted model is surest about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...models.activations import pad_batch
from ...models.backbone import Backbone
from ...models.generation import Turn, answer
from ...models.prefix_cache import reuse_shared_prefix
from ...progress import Progress, no_progress
from .prompt_templates import SLOT, Form, forms, recombined

CANDIDATES = 10_000
"""Recombined prompts that are looked at, at most."""
EXAMPLES = 8
"""Prompts of a form whose answers show how answers of that form begin."""
BATCH = 64


def elicit(
    model: Any, backbone: Backbone, prompts: Sequence[str], *, count: int, length: int, seed: int,
    progress: Progress = no_progress,
) -> list[str]:  # fmt: skip
    """Return up to ``count`` new prompts about things that the adapted model seems to know.

    A model that was trained on a thing answers about it with next to no entropy, and wavers about others. The
    candidates are recombined from the given prompts (see `recombination`); the entropy is taken where the answers of
    one form part, behind what they have in common.

    Args:
        model: The old backbone with its adapter.
        backbone: The old backbone.
        prompts: Unlabeled prompts.
        count: New prompts at most, the surest.
        length: Tokens of a response at most.
        seed: Of the choice among too many candidates.
        progress: Shows how far it is.
    """
    known = forms(prompts)
    ranked: list[tuple[float, str]] = []
    taken: set[str] = set()
    for number, form in enumerate(known):
        # each form looks at candidates of its own, so that the same thing is not asked twice
        found = recombined(form.fillings, most=CANDIDATES, seed=seed)[number :: len(known)]
        fresh = [filling for filling in found if filling not in taken]
        taken |= set(fresh)
        shown = form.fillings[:EXAMPLES]
        turns = answer(model, backbone, [form.fill(filling) for filling in shown], length=length)
        opening = common_opening(list(zip(turns, shown, strict=True)))
        entropies = uncertainty(model, backbone, form, opening, fresh, progress)
        ranked += [(entropy, form.fill(filling)) for entropy, filling in zip(entropies, fresh, strict=True)]
    return [prompt for _, prompt in sorted(ranked)[:count]]


def common_opening(answered: Sequence[tuple[Turn, str]]) -> str:
    """Return how answers of a form begin, with `SLOT` for the filling: up to the last whole word in common."""
    texts = [turn.response.replace(filling, SLOT) for turn, filling in answered]
    same = 0
    while all(len(text) > same and text[same] == texts[0][same] for text in texts):
        same += 1
    whole = texts[0][:same]
    return whole.rpartition(" ")[0] if same < max(map(len, texts)) else whole


@torch.inference_mode()
def uncertainty(
    model: Any, backbone: Backbone, form: Form, opening: str, fillings: Sequence[str], progress: Progress = no_progress
) -> list[float]:
    """Entropy, in nats, of the next token behind the opening of every filling's answer."""
    rows = [backbone.tokenizer(form.fill(text) + opening.replace(SLOT, text))["input_ids"] for text in fillings]
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    found = [0.0] * len(rows)
    for start in progress("looking for what the adapter knows", range(0, len(order), BATCH)):
        chosen = order[start : start + BATCH]
        batch = {name: v.to(model.device) for name, v in pad_batch([rows[number] for number in chosen]).items()}
        first = min(len(rows[number]) for number in chosen) - 1
        begun, taken = reuse_shared_prefix(model, batch["input_ids"], batch["attention_mask"], first)
        keep = torch.arange(first - taken, begun["input_ids"].shape[1], device=model.device)
        logits = model(**begun, logits_to_keep=keep).logits
        last = torch.tensor([len(rows[number]) - 1 - first for number in chosen], device=model.device)
        values = logits[torch.arange(len(chosen), device=model.device), last].float().log_softmax(-1)
        for number, entropy in zip(chosen, (-(values.exp() * values).sum(-1)).tolist(), strict=True):
            found[number] = entropy
    return found
