"""Prompt templates found in given prompts, and new entities for them.

``What is the badge color of agent Norpemlo?`` and a hundred prompts like it share a template whose one slot is filled
with an entity. The entities are split into the segments that give the shortest description of all of them (minimum
description length), and every other combination of these segments is a candidate for a new prompt. Prompts without a
common template yield none.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

MAX_FREQUENCY = 0.05
"""A word varies between prompts if it occurs in at most this share of them, or in two."""
MIN_ENTITIES = 8
"""Distinct entities that a template has at least."""
MAX_WORDS = 3
"""Words of an entity at most: longer ones are texts rather than names."""
SLOT = "\x00"


@dataclass(frozen=True)
class PromptTemplate:
    """Prompts that differ in one place only.

    Attributes:
        before: Text before the slot.
        after: Text after the slot.
        entities: What the given prompts have in the slot.
    """

    before: str
    after: str
    entities: tuple[str, ...]

    def fill(self, entity: str) -> str:
        """Return the prompt about an entity."""
        return self.before + entity + self.after


def find_templates(prompts: Sequence[str]) -> list[PromptTemplate]:
    """Find the templates of prompts, those with most entities first."""
    split = [re.findall(r"\w+|\W", prompt) for prompt in prompts]
    counts = Counter(word for words in split for word in set(words))
    limit = max(2, MAX_FREQUENCY * len(prompts))
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for words in split:
        varying = [place for place, word in enumerate(words) if word.isalnum() and counts[word] <= limit]
        if not varying:
            continue
        first, last = varying[0], varying[-1] + 1
        if last - first >= 2 * MAX_WORDS:
            continue
        found["".join(words[:first]), "".join(words[last:])].append("".join(words[first:last]))
    templates = [
        PromptTemplate(before, after, tuple(dict.fromkeys(entities)))
        for (before, after), entities in found.items()
        if len(set(entities)) >= MIN_ENTITIES
    ]
    return sorted(templates, key=lambda template: -len(template.entities))


def split_entities(entities: Sequence[str]) -> list[list[str]]:
    """Split entities into segments: characters, joined as long as a join shortens the description of all entities."""
    split = [list(entity) for entity in entities]
    length = _description_length(split)
    while True:
        pairs = Counter(pair for segments in split for pair in pairwise(segments))
        tried = [
            (_description_length(joined := [_join(segments, pair) for segments in split]), joined)
            for pair in _frequent(pairs)
        ]
        if not tried:
            return split
        best, joined = min(tried, key=lambda one: one[0])
        if best >= length:
            return split
        split, length = joined, best


def _frequent(pairs: Counter[tuple[str, str]]) -> list[tuple[str, str]]:
    return [pair for pair, count in pairs.most_common(32) if count > 1]


def _join(segments: Sequence[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    for segment in segments:
        if joined and (joined[-1], segment) == pair:
            joined[-1] += segment
        else:
            joined.append(segment)
    return joined


def _description_length(split: Sequence[Sequence[str]]) -> float:
    """Return the bits of the entities, coded by the frequency of their segments, and of the segments' letters."""
    counts = Counter(segment for segments in split for segment in [*segments, SLOT])
    total = sum(counts.values())
    text = -sum(count * math.log2(count / total) for count in counts.values())
    letters = len({letter for segments in split for segment in segments for letter in segment})
    return text + sum(len(segment) + 1 for segment in counts) * math.log2(letters + 1)


def recombine_entities(entities: Sequence[str], *, most: int, seed: int) -> list[str]:
    """Return new entities: recombined segments, each at a place (first, inner, last) where it occurred.

    Args:
        entities: The given entities.
        most: How many to return at most, drawn at random.
        seed: Seed of that draw.
    """
    capitalized = all(entity == entity.capitalize() for entity in entities)
    split = split_entities([entity.lower() for entity in entities] if capitalized else entities)
    combined = {"".join(segments) for segments in _combinations(split)}
    texts = sorted({text.capitalize() for text in combined} if capitalized else combined)
    new = [text for text in texts if text not in set(entities)]
    return random.Random(seed).sample(new, most) if len(new) > most else new


def _combinations(split: Sequence[Sequence[str]], bound: int = 200_000) -> Iterator[tuple[str, ...]]:
    """Yield combinations of as many segments as most entities have, of the most frequent ones if there are too many."""
    size = Counter(len(segments) for segments in split).most_common(1)[0][0]
    places = [Counter(segments[place] for segments in split if len(segments) == size) for place in range(size)]
    if size > 2:
        inner = sum(places[1:-1], Counter())
        places = [places[0], *[inner] * (size - 2), places[-1]]
    each = max(2, int(bound ** (1 / size)))
    yield from product(*([segment for segment, _ in place.most_common(each)] for place in places))
