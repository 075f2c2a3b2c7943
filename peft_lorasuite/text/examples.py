"""Labeled examples and unlabeled prompts from a file, a dataset or a list."""

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
"""Methods need at least this many prompts."""


@dataclass(frozen=True)
class Example:
    """A record with the fields of the LLM-Adapters datasets.

    Attributes:
        instruction: The question or task.
        output: The expected response.
        input: Context of the instruction, if it is separate from it.
        answer: The part of the response that is scored, if the dataset has it.
    """

    instruction: str
    output: str = ""
    input: str = ""
    answer: str = ""


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
    """Read labeled examples.

    Args:
        source: A JSON file (a list of objects) or JSON Lines file, a `datasets.Dataset`, or an iterable of mappings or
            `Example`. Each record has ``instruction`` and ``output``, and optionally ``input`` and ``answer``; other
            keys are ignored.

    Raises:
        LoraSuiteError: If the file is missing or malformed, there are no records, or a record is not a labeled
            example; the message has the record's number, starting at 1.
    """
    name, records = _load_records(source)
    return [
        _parse_example(record, f"{name}, record {number}", labeled=True) for number, record in enumerate(records, 1)
    ]


def read_prompts(source: Any, template: str | None = None) -> list[str]:
    """Read unlabeled prompts.

    Args:
        source: As for `read_examples`, except that ``output`` is optional and not used. A record can also be a string,
            or have a formatted ``prompt``. A ``.txt`` file has one prompt per line.
        template: Prompt template for records with an ``instruction``; see `format_example`.

    Raises:
        LoraSuiteError: As in `read_examples`.
    """
    name, records = _load_records(source, text_lines=True)
    return [_parse_prompt(record, f"{name}, record {n}", template) for n, record in enumerate(records, 1)]


def check_prompt_count(prompts: Sequence[str], do: str = "give more prompts") -> list[str]:
    """Return the prompts as a list; raise `LoraSuiteError`, before any model is loaded, if they are too few to fit."""
    if len(prompts) < MIN_PROMPTS:
        raise LoraSuiteError(
            "too few prompts", got=len(prompts), wanted=f"at least {MIN_PROMPTS}, better 64 or more", do=do
        )
    return list(prompts)


def _parse_prompt(record: Any, where: str, template: str | None) -> str:
    if isinstance(record, Mapping) and "prompt" in record:
        record = record["prompt"]
        if not isinstance(record, str):
            raise LoraSuiteError("a prompt must be a string", where=where, got=type(record).__name__)
    text = record if isinstance(record, str) else format_example(_parse_example(record, where, labeled=False), template)
    if not text.strip():
        raise LoraSuiteError("a prompt is empty", where=where)
    check_text(text, where)
    return text


def _parse_example(record: Any, where: str, *, labeled: bool) -> Example:
    if isinstance(record, Example):
        record = {name: getattr(record, name) for name in FIELDS}
    if not isinstance(record, Mapping):
        raise LoraSuiteError(
            "a record must be an object", where=where, got=type(record).__name__, wanted=_expected(labeled=labeled)
        )
    values = {name: record[name] for name in FIELDS if record.get(name) is not None}
    required = ("instruction", "output") if labeled else ("instruction",)
    missing = [name for name in required if not str(values.get(name, "")).strip()]
    if missing:
        raise LoraSuiteError(
            f"a record has no {' and no '.join(missing)}",
            where=where,
            got=f"the keys {', '.join(map(str, record)) or 'none'}",
            wanted=_expected(labeled=labeled),
        )
    wrong = [name for name, value in values.items() if not isinstance(value, (str, int, float))]
    if wrong:
        raise LoraSuiteError("must be a string", where=f"{where}, {wrong[0]}", got=type(values[wrong[0]]).__name__)
    texts = {name: str(value) for name, value in values.items()}
    for name, text in texts.items():
        check_text(text, f"{where}, {name}")
    return Example(**texts)


def _expected(*, labeled: bool) -> str:
    return "an object with instruction and output" if labeled else "a string, or an object with instruction or prompt"


def _load_records(source: Any, *, text_lines: bool = False) -> tuple[str, list[Any]]:
    """Return a name for messages, and the records, at least one."""
    if isinstance(source, (str, Path)):
        path = Path(source).expanduser()
        name, records = path.name, _read_file(path, text_lines=text_lines)
    elif isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise LoraSuiteError(
            "the data must be a collection of records", got=type(source).__name__,
            wanted="a file, a datasets.Dataset or a list",
            do="pass one split of a DatasetDict" if isinstance(source, Mapping) else None,
        )  # fmt: skip
    else:
        name, records = "the data", list(source)
    if not records:
        raise LoraSuiteError("has no records", where=name, wanted="at least one")
    return name, records


def _read_file(path: Path, *, text_lines: bool) -> list[Any]:
    if not is_file(path):
        raise LoraSuiteError("file not found", where=path, wanted="JSON or JSON Lines", do="check the name")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise LoraSuiteError(f"the file cannot be read: {error}", where=path, wanted="text in UTF-8") from error
    if text_lines and path.suffix.lower() == ".txt":
        return [line for line in text.split("\n") if line.strip()]  # splitlines also splits at U+2028 and others
    do = "fix the line or export the file again"
    if text_lines:
        do += "; a plain text file with one prompt per line must end in .txt"
    if text.lstrip().startswith("["):
        return list(_parse_json(text, str(path), do))
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        lines = enumerate(text.split("\n"), 1)
        return [_parse_json(line, f"{path}, line {number}", do) for number, line in lines if line.strip()]
    if not isinstance(whole, dict):
        raise LoraSuiteError("the file has no records", where=path, got=type(whole).__name__, wanted="a JSON list")
    return [whole]


def _parse_json(text: str, where: str, do: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LoraSuiteError(f"the file is neither JSON nor JSON Lines ({error})", where=where, do=do) from error
