"""Facts: what answers state about the entities of a prompt template, and at which of their tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...models.generation import Turn
from .elicitation import common_opening
from .positions import Place, Tokens
from .prompt_templates import SLOT, find_templates

EXAMPLES = 8
"""Turns of a template that show how its answers begin."""
MAX_CONFLICTS = 0.1
"""Share of entities with several answers above which the answers do not depend on the entities alone."""


@dataclass(frozen=True)
class Fact:
    """What one turn states about the entity of its prompt.

    Attributes:
        entity: The entity.
        turn: Index of the turn.
        ends: Positions, in the new tokens, where the entity ends before the answer: in the prompt, in the response.
        deciding: Position that predicts the answer.
        place: Index of that position among the places.
        answer: The new token that follows in the old adapted model's answer.
    """

    entity: str
    turn: int
    ends: tuple[int, ...]
    deciding: int
    place: int
    answer: int


def find_facts(turns: Sequence[Turn], rows: Sequence[Tokens], places: Sequence[Place]) -> list[Fact]:
    """Find what the turns of each template state about its entities.

    Templates whose answers are all the same state nothing. Entities with different answers elsewhere are left out.

    Args:
        turns: Prompts and the old adapted model's answers.
        rows: The turns in new tokens.
        places: Turn, old position and new position of each predicting position (see `positions.align`).
    """
    index = {(turn, position): number for number, (turn, _, position) in enumerate(places)}
    found: list[Fact] = []
    for template in find_templates([turn.prompt for turn in turns]):
        entities = {template.fill(entity): entity for entity in template.entities}
        members = [(n, turn, entities[turn.prompt]) for n, turn in enumerate(turns) if turn.prompt in entities]
        opening = common_opening([(turn, entity) for _, turn, entity in members[:EXAMPLES]])
        facts = []
        for n, turn, entity in members:
            own_opening = opening.replace(SLOT, entity)
            if not turn.response.startswith(own_opening):
                continue
            origin = len(turn.prompt) + turn.before
            answer_start = len(turn.prompt) + len(own_opening)
            position_of = {origin + end: position for position, end in enumerate(rows[n].ends)}
            deciding = position_of.get(answer_start)
            text = (turn.prompt + turn.response)[:answer_start]
            ends = tuple(position_of[end] for end in _occurrence_ends(text, entity) if end in position_of)
            if deciding is not None and deciding + 1 < len(rows[n].ids) and (n, deciding) in index and ends:
                facts.append(Fact(entity, n, ends, deciding, index[n, deciding], rows[n].ids[deciding + 1]))
        found += facts if len({fact.answer for fact in facts}) > 1 else []
    return _drop_conflicts(found)


def _drop_conflicts(facts: Sequence[Fact]) -> list[Fact]:
    """Leave out entities with several answers, and all facts where there are many of these entities."""
    answers: dict[str, set[int]] = defaultdict(set)
    for fact in facts:
        answers[fact.entity].add(fact.answer)
    conflicting = {entity for entity, several in answers.items() if len(several) > 1}
    if len(conflicting) > MAX_CONFLICTS * len(answers):
        return []
    return [fact for fact in facts if fact.entity not in conflicting]


def _occurrence_ends(text: str, part: str) -> Iterator[int]:
    start = text.find(part)
    while start >= 0:
        yield start + len(part)
        start = text.find(part, start + 1)
