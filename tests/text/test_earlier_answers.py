"""Where a rendered prompt has the earlier answers of its conversation, in the ways that chat templates write them."""

from __future__ import annotations

from typing import Any

import pytest
from chat_pair import CHATML, tokenizer_with

from peft_lorasuite.text.chat import NO_TEMPLATE, Chat
from peft_lorasuite.text.conversations import Conversation
from peft_lorasuite.text.messages import read_conversation
from peft_lorasuite.training.encoding import IGNORE_INDEX, encode_conversation

TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}"
CALLS = (
    "{% for m in messages %}" + TURN + "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}"
    "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Writes tool calls behind the content."""
LAST_THOUGHTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Drops the thoughts of all turns but the last."""
LATE_SYSTEM = (
    "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}[INST]{% if loop.last and "
    "messages[0].role == 'system' %}{{ messages[0].content }}\n{% endif %}{{ m.content }}[/INST]"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
"""Writes the system prompt into the last user turn."""
ENDING = CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
"""Ends a conversation that asks for no answer with the EOS token."""
NO_END = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think></think>{% endif %}"
    "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Has no end-of-turn token, but special tokens before the content."""
CHANNELS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.role == 'assistant' %}<channel>final{% endif %}<|message|>"
    "{{ m.content }}{{ eos_token if loop.last and m.role == 'assistant' else '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
"""Writes a header after the generation prompt, and the last turn with another ending."""
SYSTEM = {"role": "system", "content": "map key"}
CALL = {"type": "function", "function": {"name": "hat", "arguments": {"city": "bird"}}}


def asked(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def chat_with(template: str | None) -> Chat:
    tokenizer = tokenizer_with(CHATML if template == NO_TEMPLATE else template, chatml=True, bos=True)
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    return Chat("the model", tokenizer, NO_TEMPLATE if template == NO_TEMPLATE else None)


def outside(template: str | None, *messages: dict[str, Any]) -> str:
    """Render a prompt and leave the earlier answers out."""
    text = chat_with(template).write(read_conversation(list(messages), "the record"), answers=True)
    inside = {at for start, end in text.answers for at in range(start, end)}
    return "".join(letter for at, letter in enumerate(text) if at not in inside)


@pytest.mark.parametrize(
    ("template", "messages"),
    [
        (CHATML, (asked("red cat"), said("blue bird"), asked("sun dog"))),
        (CHATML, (asked("red cat"), said("red cat"), asked("red cat"), said("blue bird"), asked("sun dog"))),
        (CHATML, (said("blue bird"), asked("red cat"), said("blue bird"), asked("sun dog"))),
        (CALLS, (asked("red cat"), said("", tool_calls=[CALL]), {"role": "tool", "content": "tea"}, asked("sun dog"))),
        (CALLS, (asked("red cat"), said("blue bird", tool_calls=[CALL]), asked("sun dog"))),
        (LAST_THOUGHTS, (asked("red cat"), said("<think>why</think>blue bird"), asked("sun dog"))),
        (LATE_SYSTEM, (SYSTEM, asked("red cat"), said("blue bird"), asked("sun dog"))),
        (ENDING, (asked("red cat"), said("blue bird"), asked("sun dog"))),
        (NO_END, (asked("red cat"), said("blue bird"), asked("sun dog"))),
        (NO_TEMPLATE, (asked("red cat"), said("<think>why</think>blue bird"), asked("sun dog"))),
    ],
    ids=["plain", "same text", "assistant first", "call", "text and call", "thoughts dropped", "system last",
         "other ending", "no end of turn", "no template"],
)  # fmt: skip
def test_no_earlier_answer_is_outside(template: str, messages: tuple[dict[str, Any], ...]) -> None:
    left = outside(template, *messages)
    assert "bird" not in left
    assert "red cat" in left


@pytest.mark.parametrize("template", [CHATML, CALLS, LATE_SYSTEM, ENDING, NO_END, NO_TEMPLATE])
def test_other_turns_are_outside(template: str) -> None:
    left = outside(template, asked("red cat"), said("blue bird"), asked("sun dog"))
    assert "red cat" in left
    assert "sun dog" in left


@pytest.mark.parametrize("change", ["m.content | upper", "m.content | replace(' ', '-')", "m.content | tojson"])
def test_an_answer_that_is_written_in_another_way_is_found(change: str) -> None:
    template = LATE_SYSTEM.replace("m.content + eos_token", f"({change}) + eos_token")
    left = outside(template, SYSTEM, asked("red cat"), said("blue bird"), asked("sun dog"))
    assert "bird" not in left.lower()
    assert "[INST]red cat[/INST]" in left
    assert "sun dog" in left


def test_without_a_place_everything_from_there_on_counts() -> None:
    checking = "{% if m.content != 'blue bird' %}{{ raise_exception('no') }}{% endif %}{{ m.content + eos_token }}"
    late = LATE_SYSTEM.replace("{{ m.content + eos_token }}", checking)
    assert not outside(late, SYSTEM, asked("red cat"), said("blue bird"), asked("sun dog"))


@pytest.mark.parametrize("answer", ["final", "assistant", "channel final", "red cat", "a"])
def test_the_loss_covers_an_answer_whose_words_are_in_its_header(answer: str) -> None:
    chat = chat_with(CHANNELS)
    talk = Conversation((asked("red cat"), said(answer), asked("sun dog")), said(answer))
    text, spans = chat.assistant_spans(talk)
    first, last = (text[start:end] for start, end in spans)
    assert first == f"<channel>final<|message|>{answer}<|im_end|>"
    assert last == f"<channel>final<|message|>{answer}</s>"


def test_a_string_has_no_answers_and_they_are_found_on_request_alone() -> None:
    chat = chat_with(CHATML)
    assert chat.write("red cat", answers=True) == "red cat"
    talk = read_conversation([asked("red cat"), said("blue bird"), asked("sun dog")], "the record")
    assert chat.write(talk).answers == ()
    assert chat.write(talk) == chat.write(talk, answers=True)


def test_the_loss_covers_an_answer_after_special_tokens_of_its_turn() -> None:
    chat = chat_with(NO_END)
    row = encode_conversation(chat, Conversation((asked("red cat"),), said("blue bird")))
    taught = chat.tokenizer.decode([label for label in row.labels if label != IGNORE_INDEX])
    assert taught.replace(" ", "").endswith("bluebird")


def test_the_role_model_is_the_assistant() -> None:
    found = read_conversation([asked("red cat"), {"role": "model", "content": "blue bird"}], "the record")
    assert found.reference == said("blue bird")
