"""New prompts out of given ones: where prompts share a form, what fills it is cut into pieces and put together anew.

``What is the badge color of agent Norpemlo?`` and a hundred like it have one place that varies. Its fillings are cut
into the pieces that describe them shortest (minimum description length), and every other combination of pieces is a
prompt of the same form. Prompts without a common form give none.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

RARE = 0.05
"""A word that stands in at most this share of the prompts (and never in more than half) varies."""
FEWEST = 8
"""Fewer prompts of one form are no form."""
LONGEST = 3
"""Words of a filling at most: what is longer is a text of its own, not a name."""
SLOT = "\x00"


@dataclass(frozen=True)
class Form:
    """Prompts that differ in one place only.

    Attributes:
        before: Text before that place.
        after: Text behind it.
        fillings: What the given prompts have there.
    """

    before: str
    after: str
    fillings: tuple[str, ...]

    def fill(self, filling: str) -> str:
        """Return the prompt with this filling."""
        return self.before + filling + self.after


def forms(prompts: Sequence[str]) -> list[Form]:
    """Find the forms among prompts, the most frequent first."""
    split = [re.findall(r"\w+|\W", prompt) for prompt in prompts]
    seen = Counter(word for words in split for word in set(words))
    most = max(2, RARE * len(prompts))
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for words in split:
        varying = [place for place, word in enumerate(words) if word.isalnum() and seen[word] <= most]
        if not varying:
            continue
        first, last = varying[0], varying[-1] + 1
        if last - first >= 2 * LONGEST:
            continue
        found["".join(words[:first]), "".join(words[last:])].append("".join(words[first:last]))
    kept = [
        Form(before, after, tuple(dict.fromkeys(values)))
        for (before, after), values in found.items()
        if len(set(values)) >= FEWEST
    ]
    return sorted(kept, key=lambda form: -len(form.fillings))


def pieces(fillings: Sequence[str]) -> list[list[str]]:
    """Cut fillings into pieces: characters, joined as long as a join shortens the description of all fillings."""
    cut = [list(filling) for filling in fillings]
    length = _description(cut)
    while True:
        pairs = Counter(pair for parts in cut for pair in pairwise(parts))
        tried = [(_description(joined := [_join(parts, pair) for parts in cut]), joined) for pair in _frequent(pairs)]
        if not tried:
            return cut
        best, joined = min(tried, key=lambda one: one[0])
        if best >= length:
            return cut
        cut, length = joined, best


def _frequent(pairs: Counter[tuple[str, str]]) -> list[tuple[str, str]]:
    return [pair for pair, count in pairs.most_common(32) if count > 1]


def _join(parts: Sequence[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    for part in parts:
        if joined and (joined[-1], part) == pair:
            joined[-1] += part
        else:
            joined.append(part)
    return joined


def _description(cut: Sequence[Sequence[str]]) -> float:
    """Bits of the fillings, as pieces of their frequency, and of the pieces themselves, letter by letter."""
    counts = Counter(part for parts in cut for part in [*parts, SLOT])
    total = sum(counts.values())
    text = -sum(count * math.log2(count / total) for count in counts.values())
    letters = len({letter for parts in cut for part in parts for letter in part})
    return text + sum(len(part) + 1 for part in counts) * math.log2(letters + 1)


def recombined(fillings: Sequence[str], *, most: int, seed: int) -> list[str]:
    """Return new fillings: pieces in other company, each at a place (first, inner, last) where it was seen.

    Args:
        fillings: The given ones.
        most: Return at most so many, drawn at random.
        seed: Of that draw.
    """
    lowered = all(filling == filling.capitalize() for filling in fillings)
    cut = pieces([filling.lower() for filling in fillings] if lowered else fillings)
    found = {"".join(parts) for parts in _combinations(cut)}
    texts = sorted({text.capitalize() for text in found} if lowered else found)
    fresh = [text for text in texts if text not in set(fillings)]
    return random.Random(seed).sample(fresh, most) if len(fresh) > most else fresh


def _combinations(cut: Sequence[Sequence[str]], bound: int = 200_000) -> Iterator[tuple[str, ...]]:
    """Combinations of as many pieces as most fillings have; the commonest pieces where there would be too many."""
    size = Counter(len(parts) for parts in cut).most_common(1)[0][0]
    places = [Counter(parts[place] for parts in cut if len(parts) == size) for place in range(size)]
    if size > 2:
        inner = sum(places[1:-1], Counter())
        places = [places[0], *[inner] * (size - 2), places[-1]]
    each = max(2, int(bound ** (1 / size)))
    yield from product(*([piece for piece, _ in place.most_common(each)] for place in places))
