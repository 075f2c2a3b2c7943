"""Synthetic prompts about entities that the old adapted model is most certain of, beyond the given prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch

from ...models.activations import pad_batch
from ...models.backbone import Backbone
from ...models.forward import logits_at
from ...models.generation import Turn, answer
from ...models.prefix_cache import reuse_shared_prefix
from ...progress import Progress, no_progress
from ...text.examples import Prompt
from ...text.prompt_text import encode_prompt
from ...text.vocabulary import check_token_rows
from .prompt_templates import SLOT, PromptTemplate, find_templates, recombine_entities

CANDIDATES = 10_000
"""Candidate entities at most."""
EXAMPLES = 8
"""Prompts of a template whose answers show how its answers begin."""
BATCH = 64


def synthesize_prompts(
    model: Any, backbone: Backbone, prompts: Sequence[Prompt], *, count: int, length: int, seed: int,
    write: Callable[[Prompt], str] = str, progress: Progress = no_progress,
) -> list[Prompt]:  # fmt: skip
    """Return up to ``count`` new prompts about entities that the adapted model seems to know.

    About an entity of its training data a model answers with next to no entropy, about others it does not. The
    candidates are recombined from the entities of the given prompts (see `prompt_templates`), and the entropy is that
    of the token after the opening that the answers of a template have in common.

    Args:
        model: The old model with its adapter.
        backbone: The old backbone.
        prompts: Unlabeled prompts.
        count: New prompts at most, those of lowest entropy.
        length: Tokens of a response at most.
        seed: Seed of the draw where there are too many candidates.
        write: Returns the text that the model reads.
        progress: Shows the progress.
    """
    asked = {prompt if isinstance(prompt, str) else prompt.question: prompt for prompt in reversed(prompts)}
    templates = find_templates([prompt if isinstance(prompt, str) else prompt.question for prompt in prompts])
    ranked: list[tuple[float, str, Prompt]] = []
    used: set[str] = set()
    for number, template in enumerate(templates):
        # every template gets candidates of its own, so that no entity is asked about twice
        candidates = recombine_entities(template.entities, most=CANDIDATES, seed=seed)[number :: len(templates)]
        entities = [entity for entity in candidates if entity not in used]
        used |= set(entities)
        examples = template.entities[:EXAMPLES]
        example = asked[template.fill(examples[0])]
        turns = answer(model, backbone, [write(_about(example, template, one)) for one in examples], length=length)
        opening = common_opening(list(zip(turns, examples, strict=True)))
        new = [_about(example, template, entity) for entity in entities]
        texts = [(write(prompt), opening.replace(SLOT, one)) for prompt, one in zip(new, entities, strict=True)]
        entropies = next_token_entropies(model, backbone, texts, progress)
        ranked += [
            (entropy, template.fill(one), prompt) for entropy, one, prompt in zip(entropies, entities, new, strict=True)
        ]
    return [prompt for _, _, prompt in sorted(ranked, key=lambda one: one[:2])[:count]]


def _about(example: Prompt, template: PromptTemplate, entity: str) -> Prompt:
    """Return a template's prompt about another entity, in the form of one of its prompts."""
    text = template.fill(entity)
    return text if isinstance(example, str) else example.ask(text)


def common_opening(answered: Sequence[tuple[Turn, str]]) -> str:
    """Return how the answers of a template begin, up to the last whole word that they have in common.

    Args:
        answered: Turns with their entities.

    Returns:
        The opening, with `SLOT` in place of the entity.
    """
    texts = [turn.response.replace(entity, SLOT) for turn, entity in answered]
    same = 0
    while all(len(text) > same and text[same] == texts[0][same] for text in texts):
        same += 1
    opening = texts[0][:same]
    return opening.rpartition(" ")[0] if same < max(map(len, texts)) else opening


@torch.inference_mode()
def next_token_entropies(
    model: Any, backbone: Backbone, texts: Sequence[tuple[str, str]], progress: Progress = no_progress
) -> list[float]:
    """Return the entropy, in nats, of the next token after every prompt and the opening of its answer."""
    rows = [encode_prompt(backbone.tokenizer, prompt, opening)["input_ids"] for prompt, opening in texts]
    check_token_rows(backbone.tokenizer, chain.from_iterable(rows), backbone.arch.vocabulary, repr(backbone))
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    entropies = [0.0] * len(rows)
    for start in progress("looking for what the adapter knows", range(0, len(order), BATCH)):
        chosen = order[start : start + BATCH]
        batch = {name: v.to(model.device) for name, v in pad_batch([rows[number] for number in chosen]).items()}
        first = min(len(rows[number]) for number in chosen) - 1
        inputs, skipped = reuse_shared_prefix(model, batch["input_ids"], batch["attention_mask"], first)
        keep = torch.arange(first - skipped, inputs["input_ids"].shape[1], device=model.device)
        _, logits = logits_at(model, inputs, keep)
        last = torch.tensor([len(rows[number]) - 1 - first for number in chosen], device=model.device)
        log_probs = logits[torch.arange(len(chosen), device=model.device), last].float().log_softmax(-1)
        for number, entropy in zip(chosen, (-(log_probs.exp() * log_probs).sum(-1)).tolist(), strict=True):
            entropies[number] = entropy
    return entropies
