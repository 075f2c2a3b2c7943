"""Checks of regular expressions from untrusted files, which PEFT matches against module names."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterable
from importlib import import_module
from itertools import pairwise
from typing import Any

_parser: Any = import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")

MAX_LENGTH = 20_000
"""Characters of a pattern."""
NAME_LENGTH = 128
"""Characters of a module's name, for the estimate of how long a pattern takes."""
BUDGET = NAME_LENGTH**4.75
"""Most steps that the patterns of one entry can take to match a name: four repeats of any length, and a few choices."""
REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")


def find_fault(patterns: Iterable[str]) -> str | None:
    """Return why the patterns of one entry are malformed or can take very long to match; None if they are fine.

    Python tries every way to match a repeat inside a repeat, of which there are exponentially many. Repeats in a row
    take time by their number: with n characters and k repeats about n to the power of k steps.
    """
    steps = 0.0
    for pattern in patterns:
        if len(pattern) > MAX_LENGTH:
            return f"a pattern has over {MAX_LENGTH} characters"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                re.compile(pattern)
                steps += NAME_LENGTH ** min(_count_repeats(_parser.parse(pattern)), 5.0)
        except (re.error, RecursionError, OverflowError) as error:
            return f"not a regular expression: {error}"
        if steps > BUDGET:
            return "the pattern can take very long to match: it has too many repeats, or a repeat inside a repeat"
    return None


def _count_repeats(parsed: Any, *, repeated: bool = False) -> float:
    """Return the number of repeats in a row, where an alternative or optional part counts as a small one.

    Args:
        parsed: The parsed pattern.
        repeated: Whether it is the content of a repeat; any choice inside it then counts as infinitely many.
    """
    count = 0.0
    for operation, argument in parsed:
        name = str(operation)
        if name in REPEATS:
            low, high, content = argument
            again = repeated or int(high) > 1
            count += _count_repeats(content, repeated=again)
            count += _weight(int(low), int(high)) * (float("inf") if repeated and low != high else 1.0)
        elif name == "BRANCH":
            count += max(_count_repeats(part, repeated=repeated) for part in argument[1])
            count += float("inf") if repeated else 0.0 if _are_distinct(argument[1]) else 0.25
        elif name in ("GROUPREF", "GROUPREF_EXISTS"):
            count += float("inf")
        elif name in ("SUBPATTERN", "ATOMIC_GROUP", "ASSERT", "ASSERT_NOT"):
            count += _count_repeats(argument[-1] if name != "ATOMIC_GROUP" else argument, repeated=repeated)
    return count


def _weight(low: int, high: int) -> float:
    """Return how much a repeat counts: one of any length is 1, an optional part (two ways) less."""
    return 0.0 if low == high else 0.25 if high <= 1 else 1.0


def _are_distinct(alternatives: Iterable[Any]) -> bool:
    """Whether at most one alternative can match at a place: literal texts, of which none is the start of another."""
    texts = [tuple(part) for part in alternatives]
    if any(str(operation) != "LITERAL" for text in texts for operation, _ in text):
        return False
    return not any(after[: len(text)] == text for text, after in pairwise(sorted(texts)))
