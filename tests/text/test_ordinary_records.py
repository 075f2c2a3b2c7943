"""Records that look like another shape, or have keys that mean something else there: they are read as what they are."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import numpy as np
import pandas as pd
import pytest

from peft_lorasuite.errors import LoraSuiteError
from peft_lorasuite.text.conversations import Conversation
from peft_lorasuite.text.examples import read_prompts, read_records, read_texts
from peft_lorasuite.text.record_types import Completion, Example
from peft_lorasuite.text.texts import Text

USER, ANSWER = {"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}
TALK = Conversation((USER,), ANSWER)
ROUTES = '[{"from": "Paris", "to": "Rome"}]'
ROLES = '[{"role": "CEO", "name": "Ann"}]'
CALLS = '[{"name": "f", "arguments": {}}]'
GUANACO = "### Human: a### Assistant: b### Human: c"

LABELED: dict[str, tuple[Any, Any]] = {
    "an answer that begins with the prompt": (
        {"prompt": "The sky", "completion": "The sky is blue."}, Completion("The sky", "The sky is blue."),
    ),
    "nothing to correct": ({"prompt": "Right.", "completion": "Right."}, Completion("Right.", "Right.")),
    "a chosen greeting": ({"prompt": "Hello", "chosen": "Hello!", "rejected": "x"}, Completion("Hello", "Hello!")),
    "calls without tools": ({"instruction": "Call", "output": CALLS}, Example("Call", CALLS)),
    "routes": ({"instruction": "Plan", "output": ROUTES}, Example("Plan", ROUTES)),
    "routes in the prompt": ({"prompt": ROUTES, "completion": "x"}, Completion(ROUTES, "x")),
    "extracted roles": ({"instruction": "Extract", "output": ROLES}, Example("Extract", ROLES)),
    "typed objects": (
        {"instruction": "Extract", "output": '[{"type": "function", "name": "sum"}]'},
        Example("Extract", '[{"type": "function", "name": "sum"}]'),
    ),
    "a dialogue to summarize": (
        {"instruction": "Summarize", "dialogue": "A: hi", "output": "s"}, Example("Summarize", "s"),
    ),
    "a number of a conversation": ({"prompt": "P", "completion": "c", "conversation": 12}, Completion("P", "c")),
    "a question about a conversation": (
        {"question": "Q", "answer": "s", "conversation": ["a", "b"]}, Example("Q", "s"),
    ),
    "columns of no use": (
        {"instruction": "Q", "input": "", "output": "a", "system": "", "history": []}, Example("Q", "a"),
    ),
    "a formatted prompt with a system prompt": (
        {"prompt": "<s>[INST] Q [/INST]", "completion": "a", "system_prompt": "Be brief."},
        Completion("<s>[INST] Q [/INST]", "a"),
    ),
    "a model's response beside the answer": (
        {"question": "Q", "answer": "gold", "response": "model"}, Example("Q", "gold"),
    ),
    "an empty output beside the answer": ({"question": "Q", "answer": "gold", "output": ""}, Example("Q", "gold")),
    "another output beside the completion": (
        {"prompt": "Q", "completion": "gold", "output": "other"}, Completion("Q", "gold"),
    ),
    "chosen turns beside an output": ({"prompt": "Hi.", "chosen": [USER, ANSWER], "output": "o"}, TALK),
    "chosen beside a whole conversation": (
        {"messages": [USER, ANSWER], "chosen": [USER, {**ANSWER, "content": "No."}]}, TALK,
    ),
    "chosen with other keys": (
        {"messages": [USER], "chosen": [{**USER, "id": 1}, ANSWER]}, Conversation(({**USER, "id": 1},), ANSWER),
    ),
    "choices in the question": (
        {"instruction": "A) 1 or B) 2?", "output": "A", "options": ["A) 1", "B) 2"]}, Example("A) 1 or B) 2?", "A"),
    ),
    "documents of an instruction": (
        {"instruction": "Read: a. Why?", "output": "s", "context": {"title": ["a"]}}, Example("Read: a. Why?", "s"),
    ),
    "a list of passages": ({"question": "Q", "answer": "s", "context": ["a", "b"]}, Example("Q", "s", "a\nb")),
    "an empty input beside a context": (
        {"instruction": "Q", "input": "", "context": "Rain.", "output": "s"}, Example("Q", "s", "Rain."),
    ),
    "tools of a workshop": (
        {"question": "Q", "answer": "a", "tools": ["hammer", "saw"]}, Example("Q", "a"),
    ),
    "senders with their texts": ({"messages": [["user", "Hi."], ["assistant", "Hello."]]}, TALK),
    "keys that differ in case": ({"instruction": "Q", "output": "a", "Output": "b"}, Example("Q", "a")),
    "a developer's name": ({"user": "alice", "context": "Q", "response": "a"}, Example("Q", "a")),
    "both spellings of a content": (
        [{"from": "human", "value": "Hi.", "content": "x"}, {"from": "gpt", "value": "Hello."}], TALK,
    ),
    "messages as texts": ({"conversations": [json.dumps(USER), json.dumps(ANSWER)]}, TALK),
    "an avatar": ({"messages": [USER, ANSWER], "image": "https://example.org/avatar.png"}, TALK),
    "a number to complete": ({"prompt": "3 + 4 =", "completion": 7}, Completion("3 + 4 =", "7")),
    "LangChain calls": (
        [USER, {"type": "ai", "content": "", "tool_calls": [{"name": "f", "args": {"a": 1}, "id": "c"}]}],
        Conversation((USER,), {"role": "assistant", "content": "", "tool_calls": [
            {"type": "function", "function": {"name": "f", "arguments": {"a": 1}, "id": "c"}},
        ]}),
    ),
}  # fmt: skip
"""What it is -> record, and what is read from it."""


@pytest.mark.parametrize("kind", LABELED)
def test_a_record_is_read_as_what_it_is(kind: str) -> None:
    record, expected = LABELED[kind]
    assert read_records([record]) == [expected]
    assert read_records([expected]) == [expected]
    (prompt,) = read_prompts([record], "{instruction}|{input}")
    wanted = f"{expected.instruction}|{expected.input}" if isinstance(expected, Example) else expected
    assert prompt == (wanted.prompt if isinstance(wanted, Completion) else wanted)


TEXTS: dict[str, tuple[Any, str]] = {
    "the end of a user's turn": ({"text": GUANACO}, GUANACO),
    "a page of questions": ({"text": "# FAQ\n\n### Answer:\nYes."}, "# FAQ\n\n### Answer:\nYes."),
    "a play": ({"text": "INT. LAB\nASSISTANT: We are late."}, "INT. LAB\nASSISTANT: We are late."),
    "about a tag": ({"text": "See the tag [/INST] in prompts."}, "See the tag [/INST] in prompts."),
    "a tweet": ({"text": "I am happy", "user": "bob", "sentiment": 4, "query": "NO_QUERY"}, "I am happy"),
    "a labeled text": ({"text": "I am happy", "input": "bob", "output": "x", "label": 1}, "I am happy"),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_a_text_stays_whole(kind: str) -> None:
    record, text = TEXTS[kind]
    assert read_prompts([record]) == [text]


LABELS: dict[str, tuple[Any, Text]] = {
    "with a system prompt": (
        {"instruction": "Spam?", "input": "Buy!", "system": "Be brief.", "label": 1}, Text("Spam?|Buy!", label=1),
    ),
    "with choices": ({"instruction": "Spam?", "choices": ["no", "yes"], "label": 1}, Text("Spam?|", label=1)),
    "a boolean": ({"instruction": "Spam?", "output": "No", "label": False}, Text("Spam?|", label=False)),
    "arrays": (
        {"tokens": np.array(["a", "b"], dtype=object), "ner_tags": np.array([0, 1])},
        Text("a b", None, ((0, 1), (2, 3)), [0, 1]),
    ),
    "a missing pair": ({"text": "a", "text_pair": float("nan"), "label": 1}, Text("a", label=1)),
}  # fmt: skip


@pytest.mark.parametrize("kind", LABELS)
def test_a_classifier_reads_its_texts(kind: str) -> None:
    record, expected = LABELS[kind]
    assert read_texts([record], "{instruction}|{input}") == [expected]


def test_columns_of_pandas_are_prompts() -> None:
    assert read_prompts(pd.Series(["one", "two"])) == ["one", "two"]
    with pytest.raises(LoraSuiteError, match="record 1: a record has no label"):
        read_texts(pd.DataFrame([{"text": "a", "label": float("nan")}]))


DEEP = "[" * 940 + "]" * 940
BAD: dict[str, tuple[Any, str]] = {
    "deep tools": ({"messages": [USER, ANSWER], "tools": DEEP}, "tools must be a list of JSON schemas .got list"),
    "deep calls": ([USER, {"role": "function_call", "content": DEEP}], "nested too deeply|calls of tools"),
    "a sender of another type": ([{"role": 7, "content": "Hi."}, ANSWER], "message 1: a message has no role .got int"),
    "a long number": ({"instruction": 10**5000, "output": "a"}, "record 1, instruction: the number is too long"),
    "lists of different lengths": (
        {"messages": {"role": ["user", "assistant"], "content": ["Hi."]}}, "lists of a conversation have different",
    ),
    "history as text": ({"instruction": "Q", "output": "a", "history": "none"}, "history must be a list of turns"),
    "a system prompt of another type": ({"messages": [USER, ANSWER], "system": 5}, "system: the content of a message"),
    "an answer alone": ({"chosen": "Sure.", "rejected": "No."}, "a chosen text has no prompt in it"),
    "what Python prints": (
        {"prompt": "[{'role': 'user', 'content': 'Hi.'}]", "completion": "x"}, "messages as Python prints them",
    ),
    "choices apart from a prompt": (
        {"prompt": "Which?", "completion": "A", "choices": ["1", "2"]}, "the choices are apart from the question",
    ),
    "an image of a question": ({"question": "What?", "answer": "a", "image": {"bytes": "x"}}, "image beside the text"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_record_that_cannot_be_read_is_one_line(kind: str) -> None:
    record, message = BAD[kind]
    with pytest.raises(LoraSuiteError, match=message) as caught:
        read_records([record])
    assert "\n" not in str(caught.value)


def test_results_of_tools_may_have_any_values() -> None:
    at = datetime(2026, 1, 2)
    talk = [USER, {"role": "tool_call", "content": CALLS}, {"role": "tool", "content": {"time": at}}, ANSWER]
    (found,) = read_records([talk])
    assert isinstance(found, Conversation)
    assert found.messages[-1]["content"] == json.dumps({"time": str(at)})
    schema = [{"type": "function", "function": {"name": "f", "parameters": {"default": None}}}]
    (found,) = read_records([{"messages": [USER, ANSWER], "tools": json.dumps(schema)}])
    assert isinstance(found, Conversation)
    assert list(found.tools) == schema  # a null that the text has
