"""Reading examples and prompts: every shape that users bring, and a sentence for every shape that is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from peft_lorasuite.errors import LoraSuiteError
from peft_lorasuite.text.examples import Example, format_example, read_examples, read_prompts

ITEMS = [
    {"instruction": "Add.", "input": "1 2", "output": "3", "answer": "3", "source": "x"},
    {"instruction": "Say {no}.", "input": "", "output": "no\u2028never", "answer": None},
]
WANTED = [Example("Add.", "3", "1 2", "3"), Example("Say {no}.", "no\u2028never")]


def saved(folder: Path, text: str, name: str = "data.json") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_every_source_gives_the_same_examples(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps(item) for item in ITEMS)
    assert read_examples(saved(tmp_path, json.dumps(ITEMS, indent=1))) == WANTED
    assert read_examples(str(saved(tmp_path, lines + "\n\n", "data.jsonl"))) == WANTED
    assert read_examples(saved(tmp_path, "\ufeff" + lines, "marked.json")) == WANTED
    raw = "\n".join(json.dumps(item, ensure_ascii=False) for item in ITEMS)
    assert read_examples(saved(tmp_path, raw, "raw.jsonl")) == WANTED  # U+2028 ends no line of JSON lines
    assert read_examples(Dataset.from_list(ITEMS)) == WANTED
    assert read_examples(ITEMS) == WANTED
    assert read_examples(WANTED) == WANTED


def test_one_object_is_one_record(tmp_path: Path) -> None:
    assert read_examples(saved(tmp_path, json.dumps(ITEMS[0]))) == WANTED[:1]
    assert read_examples(saved(tmp_path, json.dumps(ITEMS[0], indent=2))) == WANTED[:1]


def test_the_template_has_a_form_with_and_one_without_input() -> None:
    with_input, without = (format_example(example) for example in WANTED)
    assert with_input.endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n")
    assert without == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay {no}.\n\n### Response:\n"
    )
    assert format_example(WANTED[0], "{input}: {instruction}>") == "1 2: Add.>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("\udcff{instruction}", "template: the text has a lone surrogate"),
        ("Q: {question}", "has no {instruction}"),
        ("Q: {instruction}", "has no {input}"),
    ],
)
def test_a_template_that_would_lose_text_is_refused(template: str, message: str) -> None:
    with pytest.raises(LoraSuiteError, match=message):
        format_example(WANTED[0], template)


def test_prompts_are_strings_filled_or_ready(tmp_path: Path) -> None:
    assert read_prompts(["one", {"prompt": "two"}, {"instruction": "Say {no}."}]) == [
        "one",
        "two",
        format_example(WANTED[1]),
    ]
    assert read_prompts(saved(tmp_path, "one\n\ntwo\n", "p.txt")) == ["one", "two"]
    assert read_prompts(saved(tmp_path, '["one"]')) == ["one"]
    assert read_prompts(ITEMS[1:], "{instruction}!") == ["Say {no}.!"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "data.json: has no records"),
        ("[]", "data.json: has no records"),
        ("3", "the file has no records"),
        ("[1, 2", "neither JSON nor JSON Lines"),
        ('{"instruction": "a", "output": "b"}\n{"instruc', "data.json, line 2: the file is neither"),
        ("instruction,output\na,b\n", "line 1: the file is neither JSON nor JSON Lines"),
        ('[{"instruction": "a", "output": "b"}, {"instruction": "a"}]', "record 2: a record has no output"),
        ('[{"instruction": "a", "output": " "}]', "record 1: a record has no output"),
        ('[{"question": "a"}]', "record 1: a record has no answer .got the keys question"),
        ("[" * 100_000, "neither JSON nor JSON Lines .maximum recursion depth"),
        ('{"a":' * 100_000, "line 1: the file is neither JSON nor JSON Lines .maximum recursion depth"),
        (
            '[{"instruction": "a\\ud800", "output": "b"}]',
            "record 1, instruction: the text has a lone surrogate .got 'a.+ud800', wanted text in UTF-8",
        ),
        ('["a"]', "record 1: a record must be an object .got str"),
        ('[{"instruction": "a", "output": [["b"]]}]', "record 1, output: must be a string .got list"),
    ],
)
def test_a_file_that_holds_no_examples_is_distinguished(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(LoraSuiteError, match=message):
        read_examples(saved(tmp_path, text))


@pytest.mark.parametrize(
    ("source", "message"),
    [("missing.json", "file not found"), ({"train": ITEMS}, "pass one split"), (7, "must be a collection of records")],
)
def test_a_source_that_is_none_is_refused(source: Any, message: str) -> None:
    with pytest.raises(LoraSuiteError, match=message):
        read_examples(source)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(LoraSuiteError, match="a folder, not a file"):
        read_examples(tmp_path)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_bytes(b"\xff\xfe\x00[")
    with pytest.raises(LoraSuiteError, match="wanted text in UTF-8"):
        read_examples(tmp_path / "data.json")


def test_lines_of_plain_text_end_at_line_ends_alone(tmp_path: Path) -> None:
    lines = ["one\u2028more", "two\x85more", "three\x0cmore"]
    assert read_prompts(saved(tmp_path, "\r\n".join(lines), "p.TXT")) == lines
    with pytest.raises(LoraSuiteError, match=r"a plain text file with one prompt per line must end in \.txt"):
        read_prompts(saved(tmp_path, "one\ntwo\n", "p.md"))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("  ", "a prompt is empty"),
        ({"prompt": 3}, "a prompt must be a string"),
        ("a\udcff", "record 1: the text has a lone surrogate"),
    ],
)
def test_a_prompt_says_something(record: Any, message: str) -> None:
    with pytest.raises(LoraSuiteError, match=message):
        read_prompts([record])
