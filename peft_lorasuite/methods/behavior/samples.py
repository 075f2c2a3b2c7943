"""Sample answers for the report: what the new model says without and with the result, and what the old one said."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from ...adapters.adapter import Key
from ...linalg.lowrank import LowRank
from ...models.backbone import Backbone
from ...models.distributed import process_index_and_count
from ...models.generation import Turn, answer
from .fact_editing import apply_update
from .states import LastProjection, down_projection

LENGTH = 48
"""Tokens of a sample answer at most."""

Question = tuple[str, Turn]
"""What the user asked, and the turn as the new model reads it, with the old adapted model's answer."""


def sample_answers(
    model: Any, backbone: Backbone, asked: Sequence[Question], *, length: int, plain: AbstractContextManager[Any],
    adapted: AbstractContextManager[Any],
) -> dict[str, Any]:  # fmt: skip
    """Return the entry ``samples`` of the report; none with several processes, which may have the model in parts.

    Args:
        model: The loaded new model.
        backbone: Its backbone.
        asked: The questions.
        length: Tokens of an answer at most.
        plain: Context in which the model is the new base model.
        adapted: Context in which it is the result of the method.
    """
    if not asked or process_index_and_count()[1] > 1:
        return {}
    prompts = [turn.prompt for _, turn in asked]
    stops = {turn.end for _, turn in asked if turn.end is not None}

    def answers(context: AbstractContextManager[Any]) -> list[str]:
        with context:
            found = answer(model, backbone, prompts, length=min(length, LENGTH), stops=stops)
        return [_text(turn.response) for turn in found]

    base, upgraded = answers(plain), answers(adapted)
    return {
        "samples": [
            {"prompt": _text(question), "base": without, "upgraded": with_it, "old": _text(turn.content)}
            for (question, turn), without, with_it in zip(asked, base, upgraded, strict=True)
        ]
    }


def _text(text: str) -> str:
    return text.replace("\0", "").strip()


@contextmanager
def applied(
    model: Any, backbone: Backbone, updates: Mapping[Key, LowRank], place: LastProjection
) -> Iterator[None]:  # fmt: skip
    """Apply the updates of `transplant` while the context lasts: that of the last projection, and of early layers."""
    with ExitStack() as stack:
        for key, update in updates.items():
            last = key == place.key
            module = model.get_submodule(place.module) if last else down_projection(model, backbone, int(key[0]))
            stack.enter_context(apply_update(module, update))
        yield
