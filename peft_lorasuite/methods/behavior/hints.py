"""Hints in the report: what the user can change where prompts or answers were cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...models.generation import Turn

CUT_ANSWERS_HINT = "most answers were cut after {0} tokens: the option length={1} reads more of them"
"""Hint where most answers of the old adapted model did not end."""
UNUSED_PROMPTS_HINT = "{0} of the prompts were used: the option prompts={1} uses more of them"
"""Hint where the caller gave more prompts than were used."""
NO_ANCHORS_HINT = (
    "no position of the prompts could be regularized toward the new model: anchor_text_tokens=3000 uses other text"
)
"""Hint where no prompt has a position that belongs to no answer."""


def length_hint(turns: Sequence[Turn], length: int) -> list[str]:
    """Return a hint where most answers were cut."""
    ended = sum(turn.ended for turn in turns)
    return [CUT_ANSWERS_HINT.format(length, 4 * length)] if 2 * ended < len(turns) else []


def unused_hint(used: int, given: int) -> list[str]:
    """Return a hint where prompts were left out."""
    return [UNUSED_PROMPTS_HINT.format(used, given)] if used < given else []


def anchor_hint(anchors: int, wanted: int) -> list[str]:
    """Return a hint where anchors are wanted and there are none."""
    return [NO_ANCHORS_HINT] if wanted and not anchors else []


def joined(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return entries of the report in one mapping, with the hints of all."""
    hints = [hint for part in parts for hint in part.get("hints", [])]
    entries = {name: value for part in parts for name, value in part.items() if name != "hints"}
    return entries | ({"hints": hints} if hints else {})
