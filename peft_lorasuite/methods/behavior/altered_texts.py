"""Altered texts for the distillation of a classifier: the old one says what they are, so that they need no label.

Texts of one source have few phrasings, and a student that agrees with the old classifier on all of them can differ on
the next one. Texts with words left out, and the beginning of one text with the end of another, show more of it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from ...text.texts import Text, join_words

LEFT_OUT = 0.2
"""Share of the words that are left out."""
JOINED = 0.5
"""Share of the texts that are joined from two; from the others words are left out."""


def altered(texts: Sequence[Text], seed: int) -> list[Text]:
    """Return an altered text for each text; pairs stay pairs, and lists of words stay lists of words."""
    source = random.Random(seed)
    return [_alter(text, source.choice(texts), source) for text in texts]


def _alter(text: Text, other: Text, source: random.Random) -> Text:
    join = source.random() < JOINED
    if text.words:
        words, others = ([one.text[start:end] for start, end in one.words] for one in (text, other))
        return join_words(_mixed(words, others or words, source) if join else _thinned(words, source))
    first = _altered_string(text.text, other.text, source, join=join)
    if text.pair is None:
        return Text(first)
    return Text(first, _altered_string(text.pair, other.pair or other.text, source, join=join))


def _altered_string(text: str, other: str, source: random.Random, *, join: bool) -> str:
    """Alter a string by its words, or by its characters where it has no spaces."""
    space = " " if " " in text.strip() else ""
    words, others = (one.split(" ") if space else list(one) for one in (text, other))
    found = space.join(_mixed(words, others, source) if join else _thinned(words, source))
    return found if found.strip() else text


def _mixed(words: Sequence[str], others: Sequence[str], source: random.Random) -> list[str]:
    """Return the beginning of one list of words and the end of another."""
    return [*words[: source.randint(1, len(words))], *others[source.randint(0, max(len(others) - 1, 0)) :]]


def _thinned(words: Sequence[str], source: random.Random) -> list[str]:
    """Return the words without some of them."""
    return [word for word in words if source.random() >= LEFT_OUT] or list(words[:1])
