"""Labeled examples and unlabeled prompts from a file, a dataset or a list."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from ..errors import LoraSuiteError
from .conversations import Conversation
from .formats import AUTO, Format
from .prompt_text import PromptText, split_answer
from .record_types import Completion, Example, Record
from .records import read_record
from .sources import open_stream
from .templates import check_template, format_prompt
from .texts import LABELS, Text, has_text, parse_text
from .values import as_record

__all__ = [
    "BUILT_IN",
    "NAMED",
    "SELF",
    "Example",
    "Prompt",
    "PromptOrText",
    "PromptsLike",
    "check_prompt_count",
    "format_example",
    "given_prompts",
    "read_examples",
    "read_prompts",
    "read_records",
    "read_texts",
]

PromptsLike: TypeAlias = "str | Path | Iterable[Any]"
"""Unlabeled prompts: a file, the Hub id of a dataset, a `datasets.Dataset`, or a list (see `read_prompts`),
`SELF` or `BUILT_IN`."""
Prompt: TypeAlias = "str | Conversation"
"""A formatted prompt, or a conversation, which every model gets through its own chat template."""
PromptOrText: TypeAlias = "str | Conversation | Text"
"""A prompt, or what a classifier reads that is more than a string."""
AnyPrompt = TypeVar("AnyPrompt", bound=PromptOrText)
SELF = "self"
"""Prompts that the old models write; a file of this name is ``./self``."""
BUILT_IN = "built-in"
"""The prompts of this package."""
NAMED = (SELF, BUILT_IN)
MIN_PROMPTS = 2
"""Methods need at least this many prompts."""
MAX_PROMPTS = 2048
"""Prompts that are drawn of a longer source; methods use 128 by default."""


def format_example(example: Example, template: str | None = None) -> str:
    """Format an example as a prompt.

    Args:
        example: The example; its ``output`` is not used.
        template: Text with ``{instruction}`` and optionally ``{input}``. The default is the LLM-Adapters template with
            an input for examples that have one, else the one without.

    Raises:
        LoraSuiteError: If the template has no ``{instruction}``, or no ``{input}`` for an example that has an input.
    """
    if template is not None:
        check_template(template)
        if example.input and "{input}" not in template:
            raise LoraSuiteError(
                "an example has an input, and the prompt template has no {input}", where="template",
                got=repr(example.input[:60]), wanted="{input} in the template",
            )  # fmt: skip
    return format_prompt({"instruction": example.instruction, "input": example.input}, template)


def read_examples(source: Any) -> list[Example]:
    """Read examples of the LLM-Adapters datasets: records with an instruction or a question, and an answer to it.

    Args:
        source: See `read_records`.

    Raises:
        LoraSuiteError: As in `read_records`, and for a record of another shape.
    """
    records = read_records(source)
    for number, record in enumerate(records, 1):
        if not isinstance(record, Example):
            raise LoraSuiteError(
                "not an instruction", where=f"record {number}", got=type(record).__name__.lower(),
                wanted="an object with instruction and output",
            )  # fmt: skip
    return [record for record in records if isinstance(record, Example)]


def read_records(source: Any, limit: int | None = None, seed: int = 0) -> list[Record]:
    """Read labeled examples of any shape.

    Args:
        source: A file (JSON, JSON Lines, CSV, TSV or Parquet), a Hub dataset (``owner/name``, ``owner/name:split`` or
            ``owner/name:config:split``), a `datasets.Dataset` or `datasets.IterableDataset`, a table of pandas, or an
            iterable of records of the shapes of `shapes.SHAPES`; other keys are ignored. The shapes may be mixed.
        limit: How many records to draw; all if None. A source is read as a stream, and only drawn records are kept.
        seed: Seed of the draw.

    Raises:
        LoraSuiteError: If the source is missing or malformed, there are no records, or a drawn record has no prompt or
            no reference; the message has the record's number, starting at 1.
    """
    stream = open_stream(source, limit=limit, seed=seed)
    drawn = stream.draw(limit, seed)
    return [read_record(record, f"{stream.name}, record {number}", labeled=True) for number, record in drawn]


def read_prompts(
    source: Any, template: str | None = None, *, limit: int | None = MAX_PROMPTS, seed: int = 0,
    form: Format | None = None, token: str | bool | None = None,
) -> list[PromptOrText]:  # fmt: skip
    """Read unlabeled prompts.

    Args:
        source: As for `read_records`, without the references, which are not used. A record can also be a string, have a
            ``text``, or be a list of messages. A ``.txt`` file has one prompt per line.
        template: Prompt template for records with an instruction or a question; see `format_example`.
        limit: How many prompts to draw at most; all if None.
        seed: Seed of the draw.
        form: Format of records with an instruction or a question, in place of ``template``; ``"chat"`` makes strings
            user turns as well.
        token: Hub token, for the Hub id of a dataset.

    Returns:
        Formatted prompts as strings, conversations and, for classifiers, pairs of texts and texts that are split into
        words (see `texts.parse_text`).

    Raises:
        LoraSuiteError: As in `read_records`.
    """
    stream = open_stream(source, text_lines=True, limit=limit, seed=seed, token=token)
    prompts: list[PromptOrText] = []
    for number, given in stream.draw(limit, seed):
        record = as_record(given)
        if isinstance(record, (PromptText, Text)):  # read before
            prompts.append(record)
            continue
        if has_text(record):
            text = parse_text(record, f"{stream.name}, record {number}")
            if text.pair is not None or text.words:
                prompts.append(text)
                continue
            asked, answer = split_answer(text.text)
            found: Record = Completion(asked)
        else:
            found = read_record(record, f"{stream.name}, record {number}", labeled=False)
            formatted = isinstance(found, Completion) and isinstance(record, Mapping) and "prompt" not in record
            answer = found.output if formatted and isinstance(found, Completion) else ""
        if isinstance(found, Example) and (form is None or form.name == AUTO):
            found = Completion(format_example(found, template))
        prompt = (form or Format()).write(found)
        if isinstance(prompt, str):
            prompts.append(PromptText(prompt, number, answer=answer))
        else:
            where = f"{stream.name}, record {number}"
            prompts.append(prompt if prompt.number else replace(prompt, number=number, where=where))
    return prompts


def read_texts(source: Any, template: str | None = None, limit: int | None = None, seed: int = 0) -> list[Text]:
    """Read labeled texts for a classifier.

    Args:
        source: As for `read_records`; every record has the fields of `texts.parse_text` and a label (see
            `texts.LABELS`), or an ``instruction`` and an ``answer`` or ``output``.
        template: Prompt template for records with an ``instruction``.
        limit: How many records to draw; all if None.
        seed: Seed of the draw.

    Raises:
        LoraSuiteError: As in `read_records`, and for a record without a label.
    """
    stream = open_stream(source, limit=limit, seed=seed)
    drawn = stream.draw(limit, seed)
    return [_read_labeled(record, f"{stream.name}, record {number}", template) for number, record in drawn]


def _read_labeled(given: Any, where: str, template: str | None) -> Text:
    record = as_record(given)
    if isinstance(record, Text):
        text = record
    elif isinstance(record, Mapping) and record.get("instruction") is not None:
        asked = {name: record[name] for name in ("instruction", "input") if record.get(name) is not None}
        example = read_record(asked, where, labeled=False)
        label = record.get("label", record.get("answer", record.get("output")))
        text = Text(format_example(example, template) if isinstance(example, Example) else "", label=label)
    else:
        text = parse_text(record if isinstance(record, Mapping) else {}, where)
    if text.label is None or text.label == "":
        raise LoraSuiteError("a record has no label", where=where, wanted=" or ".join(LABELS))
    return text


def given_prompts(
    source: Any, template: str | None = None, *, options: Any = None, seed: int = 0, form: Format | None = None,
    token: str | bool | None = None,
) -> list[PromptOrText] | str | None:  # fmt: skip
    """Read a caller's prompts before any model is loaded; None, `SELF` and `BUILT_IN` stay as they are.

    Args:
        source: As for `read_prompts`, or one of these.
        template: As for `read_prompts`.
        options: Options of the method, which may ask for more prompts than `MAX_PROMPTS`.
        seed: As for `read_prompts`.
        form: As for `read_prompts`.
        token: As for `read_prompts`.

    Raises:
        LoraSuiteError: As in `read_prompts`, and for too few prompts.
    """
    if source is None or (isinstance(source, str) and source in NAMED):
        return source
    limit = prompt_limit(options)
    return check_prompt_count(read_prompts(source, template, limit=limit, seed=seed, form=form, token=token))


def prompt_limit(options: Any) -> int:
    """Return how many prompts to read for a method with these options: a dataclass, a mapping or None."""
    wanted = options.get("prompts") if isinstance(options, Mapping) else getattr(options, "prompts", None)
    return max(MAX_PROMPTS, int(str(wanted))) if str(wanted or "").isdecimal() else MAX_PROMPTS


def check_prompt_count(prompts: Sequence[AnyPrompt], do: str = "give more prompts") -> list[AnyPrompt]:
    """Return the prompts as a list; raise `LoraSuiteError`, before any model is loaded, if they are too few to fit."""
    if len(prompts) < MIN_PROMPTS:
        raise LoraSuiteError(
            "too few prompts", got=len(prompts), wanted=f"at least {MIN_PROMPTS}, better 64 or more", do=do
        )
    return list(prompts)
