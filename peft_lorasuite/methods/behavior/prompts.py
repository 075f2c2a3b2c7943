"""The prompts that the old adapted model answers, as each of the two models reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...adapters.chat_template import read_chat_template
from ...errors import LoraSuiteError
from ...models.backbone import Backbone
from ...models.generation import Turn
from ...text.chat_pair import ChatPair
from ...text.conversations import Conversation
from ...text.examples import Prompt, PromptOrText
from ...text.texts import Text
from ..base import MethodInput
from .formats import FormatTrial
from .hints import joined, unused_hint


@dataclass(frozen=True, eq=False)
class ChosenPrompts:
    """Prompts with the chat templates of both sides.

    Attributes:
        prompts: The prompts.
        chat: The templates.
        form: Name of their format, for the report; None for given prompts.
        trial: Prompts in several formats, to compare.
        origin: Where they are from, for the report.
        available: How many the caller gave; 0 where they are from elsewhere.
        extra: How many of the last prompts are not fitted: they are there for the sample answers of the report.
    """

    prompts: Sequence[Prompt]
    chat: ChatPair
    form: str | None = None
    trial: FormatTrial | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)
    available: int = 0
    extra: int = 0

    @property
    def fitted(self) -> int:
        """How many prompts are fitted, the first ones."""
        return len(self.prompts) - self.extra

    @property
    def old_texts(self) -> list[str]:
        """What the old model reads."""
        return [self.chat.old.write(prompt) for prompt in self.prompts]

    @property
    def stops(self) -> set[int]:
        """Ids of the end-of-turn tokens of the old template."""
        ends = (self.chat.old.turn_ends(prompt) for prompt in self.prompts)
        return {one.end for one in ends if one is not None}

    def both_turns(self, turns: Sequence[Turn]) -> tuple[list[Turn], list[Turn]]:
        """Return turns of the old model with what its template writes around an answer, and those of the new model.

        A new turn has the same answer: after the prompt that the new template renders, between what this template
        writes before and after an answer, and with its end-of-turn token.
        """
        pairs = [self._both(prompt, turn) for prompt, turn in zip(self.prompts, turns, strict=True)]
        return [old for old, _ in pairs], [new for _, new in pairs]

    def _both(self, prompt: Prompt, turn: Turn) -> tuple[Turn, Turn]:
        if isinstance(prompt, str):
            return turn, turn
        old, new = self.chat.old.turn_ends(prompt), self.chat.new.turn_ends(prompt)
        if old is not None:
            shared = new is not None and old.before.strip() and old.before == new.before  # a part of the answer
            before = 0 if shared else len(old.before) if turn.response.startswith(old.before) else 0
            inside = turn.response[before:]
            after = len(old.after) if turn.ended and inside.endswith(old.after) else 0
            end = turn.end if turn.ended else old.end
            turn = replace(turn, before=before, after=after, end=end)
        before, after = (new.before, new.after if turn.ended else "") if new else ("", "")
        before = "" if before.strip() else before  # an empty block of thoughts: answers follow the generation prompt
        other = Turn(
            self.chat.new.write(prompt, answers=True),
            before + turn.content + after,
            turn.ended,
            before=len(before),
            after=len(after),
            end=new.end if new else None,
        )
        return turn, other

    def facts(self) -> dict[str, Any]:
        """Return entries of the report."""
        hints = unused_hint(self.fitted, self.available)
        facts = joined({"hints": hints}, {"prompts": dict(self.origin)} if self.origin else {})
        if count := sum(isinstance(prompt, Conversation) for prompt in self.prompts[: self.fitted]):
            facts["chat"] = {
                "conversations": count, "new_template": self.chat.origin, "system": self.chat.new.system
            }  # fmt: skip
        if self.trial is not None and self.trial.scores:
            facts |= self.trial.facts(self.form)
        elif self.form is not None:
            facts["format"] = {"used": self.form}
        return facts


def check_single(prompts: Sequence[PromptOrText]) -> list[Prompt]:
    """Return the prompts; raise `LoraSuiteError` for pairs of texts and lists of words, which only classifiers read."""
    single: list[Prompt] = []
    for number, prompt in enumerate(prompts, 1):
        if isinstance(prompt, Text):
            raise LoraSuiteError(
                "a causal language model reads single texts", where=f"prompt {number}", got="a pair of texts, or words",
                wanted="a string, or an object with instruction, prompt or messages",
            )  # fmt: skip
        single.append(prompt)
    return single


def open_chat(inputs: MethodInput, old: Backbone, new: Backbone, prompts: Sequence[Prompt]) -> ChatPair:
    """Open the chat templates of both sides, and check that the prompts render."""
    own = None if inputs.adapter.source is None else read_chat_template(inputs.adapter.source)
    return ChatPair.open(
        inputs.chat, (repr(old), old.tokenizer), (repr(new), new.tokenizer), prompts, adapter_template=own
    )
