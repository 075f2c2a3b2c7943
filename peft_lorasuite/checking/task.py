"""The prompts of a check, with the reference answers if the data has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import LoraSuiteError
from ..methods.base import MethodInput
from ..methods.behavior.prompt_sources import plan_prompts
from ..methods.behavior.prompts import ChosenPrompts, open_chat
from ..models.backbone import Backbone
from ..text.chat import Chat
from ..text.conversations import ASSISTANT, Conversation, spread_turns
from ..text.examples import NAMED, Prompt, check_prompt_count
from ..text.record_types import Completion, Example, Record
from ..text.records import read_record
from ..text.sources import open_stream
from ..training.encoding import Encoded, encode_examples


@dataclass(frozen=True, eq=False)
class Task:
    """The prompts of a check.

    Attributes:
        chosen: The prompts, with the chat templates of both sides.
        references: The reference answer of each; empty without labels.
        scored: The part of each reference that is scored, empty where it is all of it.
    """

    chosen: ChosenPrompts
    references: Sequence[str] = ()
    scored: Sequence[str] = ()

    @property
    def labeled(self) -> bool:
        """Whether there are reference answers."""
        return bool(self.references)

    def label_rows(self, backbone: Backbone, chat: Chat) -> list[Encoded]:
        """Tokenize the prompts with their reference answers, as one side reads them."""
        pairs = zip(self.chosen.prompts, self.references, strict=True)
        records: list[Record] = [
            replace(prompt, reference={"role": ASSISTANT, "content": reference})
            if isinstance(prompt, Conversation)
            else Completion(prompt, reference)
            for prompt, reference in pairs
        ]
        return encode_examples(backbone.tokenizer, records, None, chat=chat, rows=backbone.arch.vocabulary)


def plan_task(
    inputs: MethodInput, old: Backbone, new: Backbone, *, limit: int, length: int
) -> Callable[[Any], Task]:  # fmt: skip
    """Read the data, and return a function that chooses the prompts with the old adapted model.

    Without data these are built-in prompts in the format of the adapter, which this model shows, or its own.

    Args:
        inputs: The old adapter, the data as ``prompts``, how conversations are rendered, the seed.
        old: The old backbone.
        new: The new backbone.
        limit: Prompts at most.
        length: Tokens of an answer at most.

    Raises:
        LoraSuiteError: If the data is malformed, or only some records have a reference.
    """
    if inputs.prompts is None or (isinstance(inputs.prompts, str) and inputs.prompts in NAMED):
        choose = plan_prompts(inputs, old, new, limit, length)
        return lambda model: Task(choose(model))
    records = spread_turns(_read(inputs.prompts, limit, inputs.seed), limit, inputs.seed)
    form = inputs.chat.prompt_format
    prompts: list[Prompt] = check_prompt_count([form.write(record) for record in records], "give more records")
    references = [_reference(record) for record in records]
    if any(references) and not all(references):
        raise LoraSuiteError(
            "only some records have a reference answer", where=inputs.prompts, got=f"{sum(map(bool, references))} of"
            f" {len(references)}", do="leave out those without one, or all references",
        )  # fmt: skip
    chosen = ChosenPrompts(prompts, open_chat(inputs, old, new, prompts))
    scored = [record.answer if isinstance(record, Example) else "" for record in records]
    task = Task(chosen, references if all(references) else (), scored)
    return lambda model: task


def read_conversations(source: str | Path, limit: int, seed: int, form: Any) -> list[Prompt]:
    """Read the prompts of a file, of which references are not used."""
    return [form.write(record) for record in _read(source, limit, seed)]


def _read(source: Any, limit: int, seed: int) -> list[Record]:
    stream = open_stream(source, text_lines=True, limit=limit, seed=seed)
    drawn = stream.draw(limit, seed)
    return [read_record(record, f"{stream.name}, record {number}", labeled=False) for number, record in drawn]


def _reference(record: Record) -> str:
    if isinstance(record, Conversation):
        return (record.reference or {}).get("content", "").strip()
    return record.output.strip()
