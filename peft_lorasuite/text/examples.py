"""Examples with labels and prompts without, from a file, a dataset or a list (the template's text is in `answers`)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from ..errors import LoraSuiteError
from ..io.paths import is_file
from .templates import check_template, check_text, format_prompt

FIELDS = ("instruction", "input", "output", "answer")
PromptsLike: TypeAlias = "str | Path | Iterable[Any]"
"""Unlabeled prompts: a file, a `datasets.Dataset`, or a list of strings or records; see `read_prompts`."""
MIN_PROMPTS = 2
"""Prompts that a method needs at least."""


@dataclass(frozen=True)
class Example:
    """An item in the shape of the LLM-Adapters collection.

    Attributes:
        instruction: What is asked.
        output: The response that is wanted.
        input: What the question is about, if it is not in the instruction.
        answer: The part of the response that counts, if the data names it.
    """

    instruction: str
    output: str = ""
    input: str = ""
    answer: str = ""


def format_example(example: Example, template: str | None = None) -> str:
    """Put an example into the prompt.

    Args:
        example: The example; its ``output`` is not used.
        template: Text with ``{instruction}`` and, if wanted, ``{input}``; by default the two LLM-Adapters templates,
            the one with an input where the example has one.

    Raises:
        LoraSuiteError: When the template has no place for the instruction, or none for an input that is there.
    """
    if template is not None:
        check_template(template)
        if example.input and "{input}" not in template:
            raise LoraSuiteError(
                "an example has an input and the prompt template has no place for it", where="template",
                got=repr(example.input[:60]), wanted="{input} in the template",
            )  # fmt: skip
    return format_prompt({"instruction": example.instruction, "input": example.input}, template)


def read_examples(source: Any) -> list[Example]:
    """Read labeled examples.

    Args:
        source: A file of JSON (a list of objects) or JSON lines, a `datasets.Dataset`, or an iterable of mappings or
            `Example`. Each has ``instruction`` and ``output``, and may have ``input`` and ``answer``; further keys
            are left alone.

    Raises:
        LoraSuiteError: When there is no such file, nothing in it, or a record that is no labeled example; the
            message names the record by its number, from 1.
    """
    place, records = _records(source)
    return [_example(record, f"{place}, record {number}", labeled=True) for number, record in enumerate(records, 1)]


def read_prompts(source: Any, template: str | None = None) -> list[str]:
    """Read unlabeled prompts.

    Args:
        source: As for `read_examples`, where ``output`` may be missing and is not used; a record may also be a string
            or hold a ready ``prompt``. A ``.txt`` file has one prompt a line.
        template: Template for records with an ``instruction``.

    Raises:
        LoraSuiteError: As `read_examples` does.
    """
    place, records = _records(source, lines=True)
    return [_prompt(record, f"{place}, record {number}", template) for number, record in enumerate(records, 1)]


def check_prompt_count(prompts: Sequence[str], do: str = "give more prompts") -> list[str]:
    """Return prompts that a method can fit on; checked before the long work, since one is too few to fit anything."""
    if len(prompts) < MIN_PROMPTS:
        raise LoraSuiteError(
            "too few prompts", got=len(prompts), wanted=f"at least {MIN_PROMPTS}, better 64 or more", do=do
        )
    return list(prompts)


def _prompt(record: Any, where: str, template: str | None) -> str:
    if isinstance(record, Mapping) and "prompt" in record:
        record = record["prompt"]
        if not isinstance(record, str):
            raise LoraSuiteError("a prompt is no text", where=where, got=type(record).__name__)
    text = record if isinstance(record, str) else format_example(_example(record, where, labeled=False), template)
    if not text.strip():
        raise LoraSuiteError("a prompt is empty", where=where)
    check_text(text, where)
    return text


def _example(record: Any, where: str, *, labeled: bool) -> Example:
    if isinstance(record, Example):
        record = {name: getattr(record, name) for name in FIELDS}
    if not isinstance(record, Mapping):
        raise LoraSuiteError(
            "a record is no object", where=where, got=type(record).__name__, wanted=_wanted(labeled=labeled)
        )
    values = {name: record[name] for name in FIELDS if record.get(name) is not None}
    needed = ("instruction", "output") if labeled else ("instruction",)
    empty = [name for name in needed if not str(values.get(name, "")).strip()]
    if empty:
        raise LoraSuiteError(
            f"a record has no {' and no '.join(empty)}",
            where=where,
            got=f"the keys {', '.join(map(str, record)) or 'none'}",
            wanted=_wanted(labeled=labeled),
        )
    strange = [name for name, value in values.items() if not isinstance(value, (str, int, float))]
    if strange:
        raise LoraSuiteError(
            "a field is no text", where=f"{where}, {strange[0]}", got=type(values[strange[0]]).__name__
        )
    texts = {name: str(value) for name, value in values.items()}
    for name, text in texts.items():
        check_text(text, f"{where}, {name}")
    return Example(**texts)


def _wanted(*, labeled: bool) -> str:
    return "an object with instruction and output" if labeled else "a string, or an object with instruction or prompt"


def _records(source: Any, *, lines: bool = False) -> tuple[str, list[Any]]:
    """Return a name for messages, and the records; never an empty list."""
    if isinstance(source, (str, Path)):
        path = Path(source).expanduser()
        place, records = path.name, _read(path, lines=lines)
    elif isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise LoraSuiteError(
            "no collection of records", got=type(source).__name__, wanted="a file, a datasets.Dataset or a list",
            do="of a DatasetDict, name the split" if isinstance(source, Mapping) else None,
        )  # fmt: skip
    else:
        place, records = "the data", list(source)
    if not records:
        raise LoraSuiteError("there is no record in it", where=place, wanted="at least one")
    return place, records


def _read(path: Path, *, lines: bool) -> list[Any]:
    if not is_file(path):
        raise LoraSuiteError("there is no such file", where=path, wanted="JSON or JSON lines", do="check the name")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise LoraSuiteError(f"the file cannot be read: {error}", where=path, wanted="text in UTF-8") from error
    if lines and path.suffix.lower() == ".txt":
        return [line for line in text.split("\n") if line.strip()]  # splitlines would also cut at U+2028 and others
    do = f"mend the line or export it again{'; plain text, a prompt a line, must end in .txt' if lines else ''}"
    if text.lstrip().startswith("["):
        return list(_loads(text, str(path), do))
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        return [_loads(line, f"{path}, line {n}", do) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not isinstance(whole, dict):
        raise LoraSuiteError("the file holds no records", where=path, got=type(whole).__name__, wanted="a JSON list")
    return [whole]


def _loads(text: str, where: str, do: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LoraSuiteError(f"the file is neither JSON nor JSON lines ({error})", where=where, do=do) from error
