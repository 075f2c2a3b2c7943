"""Facts: what answers say about the things that fill a form, and where in their tokens they say it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...models.generation import Turn
from .elicitation import common_opening
from .positions import Place, Tokens
from .prompt_templates import SLOT, forms

SHOWN = 8
"""Turns of a form that show how its answers begin."""
TORN = 0.1
"""Share of fillings with several answers from which on the answers do not hang on the fillings alone."""


@dataclass(frozen=True)
class Fact:
    """What a turn says about the filling of its form.

    Attributes:
        filling: What the turn is about.
        turn: Number of the turn.
        ends: Positions, in the new tokens, where the filling ends before the answer: in the prompt, in the response.
        deciding: Position that predicts the answer.
        place: Number of that position among the teacher's.
        answer: The new token that the old adapted model's answer has next.
    """

    filling: str
    turn: int
    ends: tuple[int, ...]
    deciding: int
    place: int
    answer: int


def facts(turns: Sequence[Turn], rows: Sequence[Tokens], places: Sequence[Place]) -> list[Fact]:
    """Find what turns of one form say about their fillings.

    Forms whose answers are all the same say nothing, nor do fillings to which another answer is given elsewhere.

    Args:
        turns: Prompts and the old adapted model's answers.
        rows: The same in the new tokens.
        places: Turn, old position and new position of each row of the teacher.
    """
    number = {(turn, position): index for index, (turn, _, position) in enumerate(places)}
    found: list[Fact] = []
    for form in forms([turn.prompt for turn in turns]):
        wanted = {form.fill(filling): filling for filling in form.fillings}
        members = [(n, turn, wanted[turn.prompt]) for n, turn in enumerate(turns) if turn.prompt in wanted]
        opening = common_opening([(turn, filling) for _, turn, filling in members[:SHOWN]])
        info = []
        for n, turn, filling in members:
            said = opening.replace(SLOT, filling)
            if not turn.response.startswith(said):
                continue  # it answers in another form
            decided = len(turn.prompt) + len(said)
            places_of = {end: position for position, end in enumerate(rows[n].ends)}
            deciding = places_of.get(decided)
            text = (turn.prompt + turn.response)[:decided]
            ends = tuple(places_of[end] for end in _ends(text, filling) if end in places_of)
            if deciding is not None and deciding + 1 < len(rows[n].ids) and (n, deciding) in number and ends:
                info.append(Fact(filling, n, ends, deciding, number[n, deciding], rows[n].ids[deciding + 1]))
        found += info if len({fact.answer for fact in info}) > 1 else []
    return _consistent(found)


def _consistent(found: Sequence[Fact]) -> list[Fact]:
    """Leave out fillings with several answers, and everything where these are many: no fact hangs on a name then."""
    answers: dict[str, set[int]] = defaultdict(set)
    for fact in found:
        answers[fact.filling].add(fact.answer)
    torn = {filling for filling, several in answers.items() if len(several) > 1}
    if len(torn) > TORN * len(answers):
        return []
    return [fact for fact in found if fact.filling not in torn]


def _ends(text: str, part: str) -> Iterator[int]:
    start = text.find(part)
    while start >= 0:
        yield start + len(part)
        start = text.find(part, start + 1)
