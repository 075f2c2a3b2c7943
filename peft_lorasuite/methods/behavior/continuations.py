"""Which old tokens decide between a new token and longer ones that begin with the same old token."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import cache

from ...models.backbone import Backbone
from ...text.vocabulary import token_texts
from .positions import Place, Tokens
from .token_pairs import PlaceVocabularies

NO_TEXT = "\0"
"""Stands for a token without a text of its own, which goes on with no longer token."""


def deciding_positions(
    old: Backbone, new: Backbone, rows: Sequence[Tokens], places: Sequence[Place], pairs: PlaceVocabularies
) -> list[list[tuple[int, int]]]:
    """Return the old positions after each place that tell its new token from longer ones.

    Where ``_`` follows, and the new vocabulary has ``_draft`` as well, these are the positions that predict the old
    tokens after ``_``, up to the first one at which the text is no longer the beginning of a longer token: those of
    ``dr`` and ``op`` in ``_drop``.

    Args:
        old: The old backbone.
        new: The new backbone.
        rows: The turns in old tokens.
        places: The places.
        pairs: The tokens that are paired there.

    Returns:
        For every place turns and positions; none where no longer token begins with the old one that follows, or where
        the answer was cut before the text tells them apart.
    """
    shared = pairs.shared.tolist()
    if not any(shared):
        return [[] for _ in places]
    old_texts, new_texts = token_texts(old.tokenizer), token_texts(new.tokenizer)

    @cache
    def longer(kind: int, token: int) -> list[str]:
        """Return, sorted, what the longer new tokens have after the text of an old one."""
        vocabulary = pairs.vocabularies[kind]
        size = len(old_texts.get(token, "")) - len(vocabulary.starts[0]) + len(vocabulary.starts[1])
        found = vocabulary.new[vocabulary.old == token].tolist() if token in old_texts else []
        return sorted({new_texts[one][size:] for one in found if len(new_texts.get(one, "")) > size})

    def deciding(row: Tokens, position: int, tails: Sequence[str]) -> list[int]:
        found, text = [], ""
        for at in range(position + 1, row.predicting.stop) if tails else ():
            found.append(at)
            text += old_texts.get(row.predicted(at), NO_TEXT) if at + 1 < len(row.ids) else NO_TEXT
            following = bisect_right(tails, text)
            if following == len(tails) or not tails[following].startswith(text):
                return found
        return []

    kinds = pairs.kinds.tolist()
    return [
        [(turn, at) for at in deciding(rows[turn], p, longer(kind, rows[turn].predicted(p)))] if one else []
        for (turn, p, _), kind, one in zip(places, kinds, shared, strict=True)
    ]
