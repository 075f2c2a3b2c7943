"""Records of every shape: what is the prompt, what the reference, and one line for what is neither."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from anonymous import peak_of
from datasets import Dataset, IterableDataset

from peft_lorasuite.errors import LoraSuiteError
from peft_lorasuite.text.conversations import Conversation
from peft_lorasuite.text.examples import read_prompts, read_records
from peft_lorasuite.text.record_types import Completion, Example
from peft_lorasuite.text.sources import CHUNK

USER, ANSWER = {"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}
SYSTEM = {"role": "system", "content": "Be brief."}
TALK = Conversation((USER,), ANSWER)
CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "now"}}]}
RESULT = {"role": "tool", "content": "noon"}
SHAPES: dict[str, tuple[Any, Any]] = {
    "messages": ({"messages": [USER, ANSWER]}, TALK),
    "messages with a key of no use": ({"messages": [USER, ANSWER], "id": 7}, TALK),
    "messages as JSON text": ({"messages": json.dumps([USER, ANSWER])}, TALK),
    "a list of messages": ([USER, ANSWER], TALK),
    "several turns": (
        {"messages": [SYSTEM, USER, ANSWER, USER, ANSWER]},
        Conversation((SYSTEM, USER, ANSWER, USER), ANSWER),
    ),
    "tools": (
        {"messages": [USER, CALL, RESULT, ANSWER], "tools": '[{"name": "now"}]'},
        Conversation((USER, CALL, RESULT), ANSWER, ({"name": "now"},)),
    ),
    "parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i."}]},
                ANSWER,
            ]
        },
        TALK,
    ),
    "keys that are None": ({"messages": [{**USER, "tool_calls": None}, {**ANSWER, "name": None}], "tools": None}, TALK),
    "sharegpt": (
        {
            "system": "Be brief.",
            "conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}],
        },
        Conversation((SYSTEM, USER), ANSWER),
    ),
    "sharegpt calls": (
        {
            "conversations": [
                {"from": "human", "value": "Hi."},
                {"from": "function_call", "value": '{"name": "now"}'},
                {"from": "observation", "value": "noon"},
                {"from": "gpt", "value": "Hello."},
            ]
        },
        Conversation((USER, CALL, RESULT), ANSWER),
    ),
    "prompt and completion as messages": ({"prompt": [USER], "completion": [ANSWER]}, TALK),
    "prompt and chosen as messages": ({"prompt": [USER], "chosen": [ANSWER], "rejected": [USER]}, TALK),
    "chosen with the prompt in it": ({"prompt": [USER], "chosen": [USER, ANSWER]}, TALK),
    "chosen beside a string": ({"prompt": "Hi.", "chosen": [USER, ANSWER]}, TALK),
    "chosen alone": ({"chosen": [USER, ANSWER], "rejected": []}, TALK),
    "prompt and completion": ({"prompt": "Hi.", "completion": "Hello."}, Completion("Hi.", "Hello.")),
    "prompt and chosen": ({"prompt": "Hi.", "chosen": "Hello.", "rejected": "No."}, Completion("Hi.", "Hello.")),
    "alpaca": ({"instruction": "Add.", "input": "1 2", "output": "3"}, Example("Add.", "3", "1 2")),
    "question and answer": ({"question": "Why?", "answer": "So."}, Example("Why?", "So.")),
}
"""Shape -> record, and what is read from it."""
WITHOUT = {"a prompt alone": ({"prompt": "Hi."}, "Hi."), "a text": ({"text": "Hi."}, "Hi."), "a string": ("Hi.", "Hi.")}
"""Shape without a reference -> record and prompt."""


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_has_a_prompt_and_a_reference(shape: str, tmp_path: Path) -> None:
    record, expected = SHAPES[shape]
    assert read_records([record]) == [expected]
    (tmp_path / "data.jsonl").write_text(json.dumps(record) + "\n")
    assert read_records(tmp_path / "data.jsonl") == [expected] if isinstance(record, dict) else True
    assert read_records([expected]) == [expected]  # what was read can be read again
    (prompt,) = read_prompts([record], "{instruction}{input}")
    given = expected.prompt if isinstance(expected, Completion) else None
    if isinstance(expected, Example):
        given = expected.instruction + expected.input
    assert prompt == (expected if given is None else given)


@pytest.mark.parametrize("shape", WITHOUT)
def test_a_prompt_needs_no_reference(shape: str) -> None:
    record, prompt = WITHOUT[shape]
    assert read_prompts([record]) == [prompt]
    with pytest.raises(LoraSuiteError, match="the data, record 1"):
        read_records([record])


def test_mixed_shapes_are_fine(tmp_path: Path) -> None:
    records, expected = zip(*SHAPES.values(), strict=True)
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in records if isinstance(one, dict)))
    assert read_records(path) == [found for one, found in SHAPES.values() if isinstance(one, dict)]
    assert read_records(list(records)) == list(expected)


def test_a_conversation_that_ends_in_a_user_turn_is_a_prompt() -> None:
    turns = [USER, ANSWER, USER]
    assert read_prompts([{"messages": turns}]) == [Conversation(tuple(turns))]
    with pytest.raises(LoraSuiteError, match="record 1: a record has no assistant turn at the end"):
        read_records([{"messages": turns}])


BAD: dict[str, tuple[Any, str]] = {
    "without a user turn": (
        [SYSTEM, ANSWER],
        r"record 1: the conversation has no user turn before the answer .got the roles system",
    ),
    "ends in a tool result": ([USER, CALL, RESULT], "record 1: the conversation ends in a tool result"),
    "ends in a system turn": ([USER, SYSTEM], "ends in a turn of 'system'"),
    "empty assistant turn": (
        [USER, {"role": "assistant", "content": " "}, USER],
        "record 1, message 2: an assistant turn is empty",
    ),
    "image": (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, ANSWER],
        "record 1, message 1: content of type 'image_url' is not supported .wanted text.; leave it out",
    ),
    "audio": (
        [{"role": "user", "content": [{"type": "input_audio"}]}],
        "content of type 'input_audio' is not supported",
    ),
    "no messages": ([], "a conversation must be a list of messages .got an empty list"),
    "a message of text": (["Hi."], "record 1, message 1: a message must be an object .got str"),
    "no role": ([{"content": "Hi."}], "record 1, message 1: a message has no role .got the keys content"),
    "no content": ([{"role": "user"}], "a message has no content .got the keys role"),
    "content of another type": ([{"role": "user", "content": 3}], "the content of a message must be text .got int"),
    "unknown sender": ([{"from": "alien", "value": "Hi."}], "unknown sender of a message .got 'alien'"),
    "surrogate": ([{"role": "user", "content": "\udcff"}], "the text has a lone surrogate"),
}
"""Conversation -> what is said of it."""


@pytest.mark.parametrize("kind", BAD)
def test_a_conversation_that_cannot_be_used_is_one_line(kind: str) -> None:
    messages, message = BAD[kind]
    with pytest.raises(LoraSuiteError, match=message) as caught:
        read_prompts([{"messages": messages}])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"foo": 1, "bar": 2}, "record 1: unknown shape of a record .got the keys bar, foo, wanted a string, or"),
        ({"messages": None}, "unknown shape of a record .got the keys none"),
        (
            USER,
            "unknown shape of a record .got the keys content, role,.*; put the messages of one conversation in a list",
        ),
        ({"messages": "[1"}, "record 1: the text is not JSON"),
        ({"messages": [USER], "tools": 3}, "tools must be a list of JSON schemas .got int"),
        (3, "record 1: a record must be an object .got int"),
    ],
)
def test_a_record_of_unknown_shape_names_its_keys(record: Any, message: str) -> None:
    with pytest.raises(LoraSuiteError, match=message):
        read_prompts([record])


def saved_as(records: list[Any], path: Path) -> Path:
    table = Dataset.from_list(records)
    {".csv": table.to_csv, ".parquet": table.to_parquet, ".jsonl": table.to_json}[path.suffix](str(path))
    return path


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # datasets 4.0 leaves a CSV file open
@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_every_file_format_holds_the_same_examples(suffix: str, tmp_path: Path) -> None:
    records = [
        {"instruction": "Add.", "input": None, "output": "3"},
        {"instruction": "Say.", "input": "a", "output": "b"},
    ]
    assert read_records(saved_as(records, tmp_path / f"data{suffix}")) == [
        Example("Add.", "3"),
        Example("Say.", "b", "a"),
    ]


def test_conversations_in_parquet_and_in_datasets(tmp_path: Path) -> None:
    records = [{"messages": [USER, ANSWER]}, {"messages": [SYSTEM, USER, {**ANSWER, "name": "bot"}]}]
    expected = [TALK, Conversation((SYSTEM, USER), {**ANSWER, "name": "bot"})]
    assert read_records(saved_as(records, tmp_path / "data.parquet")) == expected
    assert read_records(Dataset.from_list(records)) == expected
    assert read_records(IterableDataset.from_generator(lambda: iter(records))) == expected
    assert read_records(one for one in records) == expected


def test_a_malformed_table_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "data.parquet").write_bytes(b"no parquet")
    with pytest.raises(LoraSuiteError, match="the dataset cannot be read") as caught:
        read_prompts(tmp_path / "data.parquet")
    assert "\n" not in str(caught.value)


def test_prompts_are_drawn_from_a_stream_with_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"number {n}"}) + "\n" for n in range(1, 2001)))
    drawn = read_prompts(path, limit=200, seed=1)
    numbers = [prompt.number for prompt in drawn]  # pyright: ignore[reportAttributeAccessIssue]
    assert [f"number {n}" for n in numbers] == drawn
    assert len(set(numbers)) == 200
    assert numbers == sorted(numbers)
    assert 800 < sum(numbers) / 200 < 1200  # from all of the file
    assert read_prompts(path, limit=200, seed=2) != drawn
    assert read_prompts(path, limit=200, seed=1) == drawn
    for same in (read_prompts(path), (f"number {n}" for n in range(1, 2001))):
        assert read_prompts(same, limit=200, seed=1) == drawn


def test_a_json_list_is_read_in_pieces(tmp_path: Path) -> None:
    """Items longer than a piece, numbers at its end, and text in other scripts."""
    items = [{"prompt": "ä" * (CHUNK // 3)} for _ in range(7)] + [{"prompt": "x" * (3 * CHUNK)}, {"prompt": "last"}]
    (tmp_path / "list.json").write_text(json.dumps(items, ensure_ascii=False, indent=1), encoding="utf-8")
    assert read_prompts(tmp_path / "list.json") == [item["prompt"] for item in items]
    for broken in ("[1 2]", "[1,]", "[,1]", '["a"] b', '["a", "b"', '["a"'):
        (tmp_path / "list.json").write_text(broken)
        with pytest.raises(LoraSuiteError, match="neither JSON nor JSON Lines"):
            read_prompts(tmp_path / "list.json")


READ = "import sys; from peft_lorasuite.text.examples import read_prompts; print(len(read_prompts(sys.argv[1])))"


def test_a_long_file_of_conversations_is_never_in_memory(tmp_path: Path) -> None:
    """150 MB of JSON lines take no more memory than a few of them, apart from the prompts that are drawn."""
    line = json.dumps({"messages": [{"role": "user", "content": "word " * 400}, ANSWER]}) + "\n"
    (tmp_path / "short.jsonl").write_text(2 * line)
    (tmp_path / "long.jsonl").write_text(line * (150 * 10**6 // len(line)))
    short, long = (peak_of("-c", READ, str(tmp_path / name)) for name in ("short.jsonl", "long.jsonl"))
    assert long - short < 40 * 10**6  # 2,048 drawn conversations of 2 KB, and buffers
