"""Records as public datasets have them, each as its source spells it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset

from peft_lorasuite.errors import LoraSuiteError
from peft_lorasuite.text.conversations import Conversation
from peft_lorasuite.text.examples import read_prompts, read_records
from peft_lorasuite.text.record_types import Completion, Example

USER, ANSWER = {"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}
SECOND, SAID = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
SYSTEM = {"role": "system", "content": "Be brief."}
TALK = Conversation((USER,), ANSWER)
ASKED = Conversation((SYSTEM, SECOND), SAID)
TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
CALL = {"name": "now", "arguments": {"zone": "CET"}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]}
RESULT = {"role": "tool", "content": "noon"}
WITH_TOOL = Conversation((USER,), ANSWER, (TOOL,))

LABELED: dict[str, tuple[Any, Any]] = {
    "dolly": ({"instruction": "Why?", "context": "Rain.", "response": "So."}, Example("Why?", "So.", "Rain.")),
    "squad": (
        {"title": "T", "context": "Rain.", "question": "Why?", "answers": {"text": ["So."], "answer_start": [0]}},
        Example("Why?", "So.", "Rain."),
    ),
    "sql-create-context": (
        {"question": "Why?", "context": "CREATE TABLE t (a)", "answer": "SELECT a"},
        Example("Why?", "SELECT a", "CREATE TABLE t (a)"),
    ),
    "llama-factory": (
        {"instruction": "Why?", "input": "", "output": "So.", "system": "Be brief.", "history": [["Hi.", "Hello."]]},
        Conversation((SYSTEM, USER, ANSWER, SECOND), SAID),
    ),
    "openorca": ({"id": "1", "system_prompt": "Be brief.", "question": "Why?", "response": "So."}, ASKED),
    "openorca without a system prompt": (
        {"system_prompt": "", "question": "Why?", "response": "So."}, Example("Why?", "So."),
    ),
    "orca dpo": ({"system": "Be brief.", "question": "Why?", "chosen": "So.", "rejected": "No."}, ASKED),
    "distilabel": ({"system": "Be brief.", "input": "Why?", "chosen": "So.", "rejected": "No."}, ASKED),
    "truthy dpo": ({"system": "Be brief.", "prompt": "Why?", "chosen": "So.", "rejected": "No."}, ASKED),
    "metamath": ({"query": "Why?", "response": "So.", "type": "GSM"}, Example("Why?", "So.")),
    "swift": (
        {"query": "Why?", "response": "So.", "system": "Be brief.", "history": [["Hi.", "Hello."]]},
        Conversation((SYSTEM, USER, ANSWER, SECOND), SAID),
    ),
    "prompt and response": ({"prompt": "Why?", "response": "So."}, Completion("Why?", "So.")),
    "numina": ({"problem": "Why?", "solution": "Since so.", "answer": "So."}, Example("Why?", "Since so.", "", "So.")),
    "flan": ({"inputs": "Why?", "targets": "So."}, Example("Why?", "So.")),
    "input and output": ({"input": "Why?", "output": "So."}, Example("Why?", "So.")),
    "capitals": ({"Question": "Why?", "Complex_CoT": "Hm.", "Response": "So."}, Example("Why?", "So.")),
    "counseling": ({"Context": "Why?", "Response": "So."}, Example("Why?", "So.")),
    "nemotron": ({"input": [SECOND], "output": "So.", "system_prompt": "Be brief."}, ASKED),
    "lmsys": ({"conversation": [USER, ANSWER], "model": "m", "turn": 1}, TALK),
    "capybara": ({"conversation": [{"input": "Hi.", "output": "Hello."}]}, TALK),
    "swift pairs": ({"conversation": [{"human": "Hi.", "assistant": "Hello."}]}, TALK),
    "xtuner": ({"conversation": [{"system": "Be brief.", "input": "Why?", "output": "So."}]}, ASKED),
    "lima": ({"conversations": ["Hi.", "Hello."], "source": "s"}, TALK),
    "nemo": (
        {
            "system": "Be brief.",
            "conversations": [{"from": "User", "value": "Why?"}, {"from": "Assistant", "value": "So."}],
        },
        ASKED,
    ),
    "human and gpt as roles": ([{"role": "human", "content": "Hi."}, {"role": "gpt", "content": "Hello."}], TALK),
    "langchain": ({"messages": [{"type": "human", "content": "Hi."}, {"type": "ai", "content": "Hello."}]}, TALK),
    "gemini": ([{"role": "user", "parts": [{"text": "Hi."}]}, {"role": "model", "parts": [{"text": "Hello."}]}], TALK),
    "sender with content": ([{"from": "human", "content": "Hi."}, {"from": "gpt", "text": "Hello."}], TALK),
    "columns": ({"messages": {"role": ["user", "assistant"], "content": ["Hi.", "Hello."]}}, TALK),
    "anthropic system": ({"system": [{"type": "text", "text": "Be brief."}], "messages": [SECOND, SAID]}, ASKED),
    "empty system turn": (
        {"system": "Be brief.", "messages": [{"role": "system", "content": None}, SECOND, SAID]}, ASKED,
    ),
    "system beside a prompt": ({"system": "Be brief.", "prompt": [SECOND], "completion": [SAID]}, ASKED),
    "system beside chosen": ({"system": "Be brief.", "chosen": [SECOND, SAID], "rejected": [SECOND]}, ASKED),
    "chosen without the system turn": ({"prompt": [SYSTEM, SECOND], "chosen": [SECOND, SAID]}, ASKED),
    "prompt as text, chosen as turns": ({"prompt": "Hi.", "chosen": [ANSWER]}, TALK),
    "a single turn": ({"prompt": [USER], "completion": ANSWER}, TALK),
    "llama-factory preference": (
        {"conversations": [{"from": "human", "value": "Hi."}], "chosen": {"from": "gpt", "value": "Hello."}}, TALK,
    ),
    "messages as text in CSV": ({"prompt": json.dumps([USER]), "completion": json.dumps([ANSWER])}, TALK),
    "empty conversations beside a prompt": (
        {"conversations": [], "prompt": "Why?", "response": "So."}, Completion("Why?", "So."),
    ),
    "hh-rlhf": (
        {"chosen": "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant: So.", "rejected": "No."},
        Completion("\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:", " So."),
    ),
    "chosen with the text of the prompt": (
        {"prompt": "\n\nHuman: Why?\n\nAssistant:", "chosen": "\n\nHuman: Why?\n\nAssistant: So."},
        Completion("\n\nHuman: Why?\n\nAssistant:", " So."),
    ),
    "guanaco": (
        {"text": "### Human: Hi.### Assistant: Hello.### Human: Why?### Assistant: So."},
        Completion("### Human: Hi.### Assistant: Hello.### Human: Why?### Assistant:", " So."),
    ),
    "formatted alpaca": (
        {"text": "### Instruction:\nWhy?\n\n### Response:\nSo."},
        Completion("### Instruction:\nWhy?\n\n### Response:\n", "So."),
    ),
    "llama 2": ({"text": "<s>[INST] Why? [/INST] So. </s>"}, Completion("<s>[INST] Why? [/INST]", " So. </s>")),
    "question beside a text": ({"question": "Why?", "answer": "So.", "text": "Why? So."}, Example("Why?", "So.")),
    "question beside a count of tokens": ({"question": "Why?", "answer": "So.", "tokens": 2}, Example("Why?", "So.")),
    "openai calls": (
        {
            "messages": [
                USER,
                {"role": "assistant", "content": None, "tool_calls": [
                    {"id": "c", "type": "function", "function": {**CALL, "arguments": json.dumps(CALL["arguments"])}},
                ]},
                {**RESULT, "tool_call_id": "c"}, ANSWER,
            ],
            "tools": [TOOL],
        },
        Conversation(
            (
                USER, {**CALLED, "tool_calls": [{"id": "c", "type": "function", "function": CALL}]},
                {**RESULT, "tool_call_id": "c"},
            ),
            ANSWER, (TOOL,),
        ),
    ),
    "openai functions": (
        {
            "messages": [
                USER,
                {"role": "assistant", "function_call": {"name": "now", "arguments": '{"zone": "CET"}'}},
                {"role": "function", "name": "now", "content": "noon"}, ANSWER,
            ],
            "functions": [TOOL["function"]],
        },
        Conversation((USER, CALLED, {**RESULT, "name": "now"}), ANSWER, (TOOL,)),
    ),
    "swift calls": (
        [
            USER, {"role": "tool_call", "content": json.dumps(CALL)}, {"role": "tool_response", "content": "noon"},
            ANSWER,
        ],
        Conversation((USER, CALLED, RESULT), ANSWER),
    ),
    "parallel calls": (
        [{"from": "human", "value": "Hi."}, {"from": "function_call", "value": json.dumps([CALL, CALL])}],
        Conversation((USER,), {**CALLED, "tool_calls": 2 * CALLED["tool_calls"]}),
    ),
    "xlam": (
        {"query": "Hi.", "answers": json.dumps([CALL]), "tools": json.dumps([TOOL])},
        Conversation((USER,), CALLED, (TOOL,)),
    ),
    "tools as texts": ({"messages": [USER, ANSWER], "tools": [json.dumps(TOOL)]}, WITH_TOOL),
    "a single tool": ({"messages": [USER, ANSWER], "tools": json.dumps(TOOL)}, WITH_TOOL),
    "nulls of Arrow": (
        {"messages": [USER, ANSWER], "tools": [{**TOOL, "strict": None}], "chosen": None}, WITH_TOOL,
    ),
    "result as an object": (
        [USER, CALLED, {"role": "tool", "content": {"time": "noon"}}, ANSWER],
        Conversation((USER, CALLED, {"role": "tool", "content": '{"time": "noon"}'}), ANSWER),
    ),
}  # fmt: skip
"""Source -> record, and what is read from it."""


@pytest.mark.parametrize("source", LABELED)
def test_the_record_of_a_public_dataset(source: str) -> None:
    record, expected = LABELED[source]
    assert read_records([record]) == [expected]
    (prompt,) = read_prompts([record], "{instruction}|{input}")
    wanted = f"{expected.instruction}|{expected.input}" if isinstance(expected, Example) else expected
    assert prompt == (wanted.prompt if isinstance(wanted, Completion) else wanted)
    if isinstance(record, dict):
        arrays = {
            name: np.array(value, dtype=object) if isinstance(value, list) else value for name, value in record.items()
        }
        missing = {"extra": float("nan")}
        assert read_records([arrays | missing]) == [expected]


UNUSED: dict[str, Any] = {
    "several answers": {"question": "Why?", "answer": ["So.", "Thus."]},
    "an answer as an object": {"question": "Why?", "answer": {"value": "So."}},
    "yes": {"question": "Why?", "answer": True},
    "a number": {"prompt": "Why?", "completion": 7},
    "nothing": {"prompt": "Why?", "completion": float("nan")},
    "an empty turn": {"messages": [SECOND, {"role": "assistant", "content": ""}]},
}


@pytest.mark.parametrize("kind", UNUSED)
def test_a_reference_that_is_not_used_may_be_anything(kind: str) -> None:
    (prompt,) = read_prompts([UNUSED[kind]], "{instruction}")
    assert prompt == (Conversation((SECOND,)) if "messages" in UNUSED[kind] else "Why?")


REFUSED: dict[str, tuple[Any, str]] = {
    "single messages of trees": (
        {"message_id": "1", "parent_id": None, "text": "So.", "role": "assistant"},
        "unknown shape of a record .*; put the messages of one conversation in a list",
    ),
    "choices": ({"question": "Why?", "choices": ["So.", "No."], "answer": 0}, "the choices are apart from the"),
    "images": (
        {"images": ["a.png"], "messages": [{"role": "user", "content": "<image>What?"}, ANSWER]},
        "images beside the text: not supported",
    ),
    "a sender without content": ([{"from": "human"}, ANSWER], "message 1: a message has no content .got the keys from"),
    "an empty question": ([{"role": "user", "content": " "}, ANSWER], "message 1: a user turn is empty"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_would_be_lost_is_refused(kind: str) -> None:
    record, message = REFUSED[kind]
    for read in (read_prompts, read_records):
        with pytest.raises(LoraSuiteError, match=message):
            read([record])


def test_a_rejected_answer_is_no_label() -> None:
    record = {"prompt": [USER], "completion": [ANSWER], "label": False}
    assert read_prompts([record]) == [TALK]
    with pytest.raises(LoraSuiteError, match=r"record 1: the answer is a rejected one .label false"):
        read_records([record])


def test_tables_of_pandas_are_records() -> None:
    table = pd.DataFrame([{"instruction": "Why?", "input": float("nan"), "output": "So."}])
    assert read_records(table) == [Example("Why?", "So.")]
    talks = [{"messages": [USER, CALLED, RESULT, ANSWER], "tools": [TOOL]}, {"messages": [USER, ANSWER], "tools": []}]
    expected = [Conversation((USER, CALLED, RESULT), ANSWER, (TOOL,)), TALK]
    assert read_records(Dataset.from_list(talks).to_pandas()) == expected


def test_a_config_of_a_dataset_is_named_before_the_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` reads a folder of the name as it reads the Hub."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "owner" / "name"
    configs = []
    for name in ("main", "other"):
        (folder / name).mkdir(parents=True)
        (folder / name / "test.jsonl").write_text(json.dumps({"question": f"Why {name}?", "answer": "So."}) + "\n")
        configs.append(f"- config_name: {name}\n  data_files:\n  - split: test\n    path: {name}/test.jsonl\n")
    (folder / "README.md").write_text(f"---\nconfigs:\n{''.join(configs)}---\n")
    assert read_records("owner/name:other:test") == [Example("Why other?", "So.")]
    with pytest.raises(LoraSuiteError, match=r"cannot be read: .*onfig.*owner/name:config:split"):
        read_records("owner/name:test")


def test_the_text_of_a_reward_model_is_read_whole() -> None:
    (prompt,) = read_prompts([{"text": "[INST] Why? [/INST] So."}])
    assert (prompt, prompt.answer) == ("[INST] Why? [/INST]", " So.")  # pyright: ignore[reportAttributeAccessIssue]
    assert read_prompts(["[INST] Why? [/INST] So."]) == ["[INST] Why? [/INST] So."]
