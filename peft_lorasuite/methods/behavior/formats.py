"""Which format of prompts an adapter was trained on: the one in which it is surest of how an answer starts.

In the format of its training an adapter changes the old model's predictions of the first tokens of an answer, and is
sure of its own. In others it changes them less, or is less sure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ...errors import LoraSuiteError
from ...models.backbone import Backbone
from ...text.chat_pair import ChatPair
from ...text.conversations import Conversation, user_turn
from ...text.examples import Prompt
from ...text.formats import ALPACA, CHAT, TEMPLATES, Format
from ...text.record_types import Example, Record
from .answer_scores import AnswerScore, score_answers

PROMPTS = 8
"""Prompts that are read in every format."""
CLEAR = 1.25
"""A format wins clearly if its score is this many times that of the other."""
GIVEN = "given"
"""Name of the format of given prompts that are strings."""


@dataclass(eq=False)
class FormatTrial:
    """Prompts in several formats, and how the old model starts its answers with and without the adapter.

    Attributes:
        texts: Format -> prompts as the old model reads them.
        scores: Format -> its score, once the model has read it.
    """

    texts: Mapping[str, Sequence[str]]
    scores: dict[str, AnswerScore] = field(default_factory=dict)

    @classmethod
    def of_records(cls, records: Sequence[Record], chat: ChatPair, count: int = PROMPTS) -> FormatTrial:
        """Return a trial of ``count`` instructions."""
        chosen = records[:: max(len(records) // count, 1)][:count]
        texts = {name: [str(Format.read(name).write(one)) for one in chosen] for name in TEMPLATES}
        if chat.old.has_template:
            with suppress(LoraSuiteError):  # a template that does not render them is no candidate
                texts[CHAT] = [chat.old.write(Format(CHAT).write(one)) for one in chosen]
        return cls(texts)

    @classmethod
    def of_prompts(cls, prompts: Sequence[Prompt], chat: ChatPair) -> FormatTrial | None:
        """Return a trial of given prompts, in their own format and in others; None where there is no other."""
        chosen = prompts[:: max(len(prompts) // PROMPTS, 1)][:PROMPTS]
        talks = [prompt for prompt in chosen if isinstance(prompt, Conversation)]
        own = [chat.old.write(prompt) for prompt in chosen]
        if talks:
            questions = [Example(prompt.question) for prompt in talks]
            others = {name: [str(Format.read(name).write(one)) for one in questions] for name in TEMPLATES}
            return cls({CHAT: own} | others)
        try:
            asked = [chat.old.write(user_turn(prompt)) for prompt in chosen if isinstance(prompt, str)]
        except LoraSuiteError:  # a template that does not render them is no candidate
            return None
        return cls({GIVEN: own, CHAT: asked}) if chat.old.has_template else None

    def read(self, model: Any, backbone: Backbone) -> None:
        """Score every format with a PEFT model of the old backbone that is not merged."""
        for name, texts in self.texts.items():
            self.scores[name] = AnswerScore.mean(score_answers(model, backbone, texts))

    def facts(self, used: str | None) -> dict[str, Any]:
        """Return entries of the report; ``used`` is the format of the built-in prompts, None for given prompts."""
        found = {
            name: {key: round(value, 3) for key, value in one._asdict().items()} for name, one in self.scores.items()
        }
        warning = self.warning() if used is None else None
        entry = {"used": used or next(iter(found)), "scores": found}
        return {"format": entry} | ({"warnings": [warning]} if warning else {})

    def choose(self, usual: str = ALPACA, margin: float = CLEAR) -> str:
        """Return the best format if its score is ``margin`` times that of the usual one, else this one."""
        best = max(self.scores, key=lambda name: self.scores[name].sureness)
        return best if self.scores[best].sureness >= margin * self.scores[usual].sureness else usual

    def warning(self) -> str | None:
        """Return a warning where the format of given prompts loses clearly against another."""
        (_, score), *others = self.scores.items()
        best = max(others, key=lambda one: one[1].sureness, default=None)
        if best is None or best[1].sureness < CLEAR * max(score.sureness, 1e-3):
            return None
        return (
            f"the adapter was probably trained on prompts in the format {best[0]!r}: there it changes the start "
            f"of an answer by {best[1].change:.2f} nats a token (entropy {best[1].entropy:.2f}), in the given prompts "
            f"by {score.change:.2f} (entropy {score.entropy:.2f}); pass --format {best[0]}, or other prompts"
        )
