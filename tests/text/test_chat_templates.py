"""Chat templates: what each model reads, once with special tokens, and what ends an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chat_pair import ANSWERS, CHATML, LLAMA2, tokenizer_with

from peft_lorasuite.errors import LoraSuiteError
from peft_lorasuite.text.chat import Chat
from peft_lorasuite.text.chat_options import ChatOptions, parse_variable, read_template
from peft_lorasuite.text.chat_pair import ChatPair
from peft_lorasuite.text.conversations import Conversation, user_turn
from peft_lorasuite.text.prompt_text import PromptText, encode_prompt
from peft_lorasuite.training.encoding import IGNORE_INDEX, encode, encode_conversation

ASKED = user_turn("red cat")
TALK = Conversation(
    (
        {"role": "user", "content": "red cat"},
        {"role": "assistant", "content": "blue"},
        {"role": "user", "content": "sun dog"},
    ),
    {"role": "assistant", "content": "sea tea"},
)


def chat(template: str | None, **options: Any) -> Chat:
    return Chat("the model", tokenizer_with(template, chatml=template == CHATML, bos=True), **options)


def test_a_rendered_prompt_has_its_special_tokens_once() -> None:
    """The template of Llama 2 writes BOS, ChatML none, and the tokenizer would add one to every text."""
    one, other = chat(LLAMA2), chat(CHATML)
    first, second = (side.write(ASKED) for side in (one, other))
    assert first == "<s>[INST] red cat [/INST]"
    assert second == "<|im_start|>user\nred cat<|im_end|>\n<|im_start|>assistant\n"
    ids = [encode_prompt(side.tokenizer, text)["input_ids"] for side, text in ((one, first), (other, second))]
    assert [row.count(1) for row in ids] == [1, 0]
    assert (
        ids[0]
        == one.tokenizer.apply_chat_template(list(ASKED.messages), add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
    )


@pytest.mark.parametrize(
    ("text", "count"), [("red cat", 1), ("<s>red cat", 1), (PromptText("red cat", rendered=True), 0)]
)
def test_a_string_that_begins_with_bos_gets_no_second_one(text: str, count: int) -> None:
    tokenizer = tokenizer_with(None, bos=True)
    assert encode_prompt(tokenizer, text)["input_ids"].count(1) == count
    assert encode(tokenizer, text, " blue").ids.count(1) == count


def test_what_a_template_writes_around_an_answer() -> None:
    ends = chat(LLAMA2).turn_ends(ASKED)
    assert ends is not None
    assert (ends.before, ends.after, ends.end) == (" ", " ", 2)
    other = chat(CHATML)
    ends = other.turn_ends(ASKED)
    assert ends is not None
    assert (ends.before, ends.after) == ("", "")
    assert ends.end == other.tokenizer.convert_tokens_to_ids("<|im_end|>") != other.tokenizer.eos_token_id
    without = chat("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}").turn_ends(ASKED)
    assert without is not None
    assert (without.after, without.end) == ("", 2)  # no token of its own: the end of sequence
    assert chat(CHATML).turn_ends("a string") is None


def test_the_loss_is_on_assistant_turns_alone() -> None:
    """All of them, each with its end-of-turn token, as TRL's ``assistant_only_loss``."""
    for template, end, before in ((CHATML, "<|im_end|>", ""), (LLAMA2, " </s>", " ")):
        side = chat(template)
        row = encode_conversation(side, TALK)
        with_loss = [number for number, label in enumerate(row.labels) if label != IGNORE_INDEX]
        assert (
            side.tokenizer.decode([row.ids[number] for number in with_loss]) == f"{before}blue{end}{before}sea tea{end}"
        )
        assert with_loss[0] == row.start
        whole = side.tokenizer.apply_chat_template([*TALK.messages, TALK.reference], return_dict=True)["input_ids"]
        assert list(row.ids) == whole[: len(row.ids)]  # what follows the last end of turn is left out
    assert len(encode_conversation(chat(CHATML), TALK, cutoff=9).ids) == 9


def test_a_turn_of_weight_zero_has_no_loss() -> None:
    """As in OpenAI's format."""
    side = chat(CHATML)
    first, wrong, second = TALK.messages
    text, spans = side.assistant_spans(Conversation((first, {**wrong, "weight": 0}, second), TALK.reference))
    assert [text[start:end] for start, end in spans] == ["sea tea<|im_end|>"]


def test_a_developer_turn_is_a_system_turn_for_templates_that_know_none() -> None:
    talk = Conversation(({"role": "developer", "content": "sea"}, *ASKED.messages))
    known = "{% for m in messages if m['role'] in ROLES %}[{{ m['role'] }}: {{ m['content'] }}]{% endfor %}"
    for roles, written in (("('system', 'user')", "[system: sea]"), ("('developer', 'user')", "[developer: sea]")):
        assert chat(known.replace("ROLES", roles)).write(talk) == f"{written}[user: red cat]"


def test_a_system_prompt_is_for_conversations_without_one() -> None:
    side = chat(CHATML, system="sea")
    assert side.write(ASKED).startswith("<|im_start|>system\nsea<|im_end|>\n<|im_start|>user")
    own = Conversation(({"role": "system", "content": "tea"}, *ASKED.messages))
    assert side.write(own).startswith("<|im_start|>system\ntea<|im_end|>\n<|im_start|>user")
    assert side.write("a string") == "a string"


def test_variables_and_tools_reach_the_template() -> None:
    template = "{{ 'think' if enable_thinking else 'answer' }} {{ tools | length if tools else 0 }}"
    talk = Conversation(ASKED.messages, tools=({"type": "function", "function": {"name": "now"}},))
    assert chat(template, variables={"enable_thinking": True}).write(talk) == "think 1"
    assert chat(template, variables={"enable_thinking": parse_variable("false")}).write(ASKED) == "answer 0"


@pytest.mark.parametrize(("text", "value"), [("false", False), ("3", 3), ("True", True), ("low", "low"), ("[1]", [1])])
def test_variables_on_a_command_line_are_json_or_text(text: str, value: Any) -> None:
    assert parse_variable(text) == value


def test_a_template_is_a_file_its_text_or_none(tmp_path: Path) -> None:
    (tmp_path / "a.jinja").write_text(CHATML)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ 1 }}"}')
    assert read_template(tmp_path / "a.jinja", "x") == CHATML
    assert read_template(tmp_path / "tokenizer_config.json", "x") == "{{ 1 }}"
    assert read_template(CHATML, "x") == CHATML
    plain = Chat("the model", tokenizer_with(CHATML), "none")
    assert plain.turn_ends(ASKED) is None
    assert plain.write(Conversation((*TALK.messages,))) == "red cat\n\nblue\n\nsun dog\n\n"
    with pytest.raises(LoraSuiteError, match="old_template: the old side has no other template"):
        ChatOptions(old_template="old")


def test_an_old_template_that_fails_is_not_called_the_new_backbones() -> None:
    failing = tokenizer_with("{{ messages[0]['content'] + 1 }}")
    with pytest.raises(LoraSuiteError, match=r"^new with the template of the old side, the prompt: the chat template"):
        ChatPair.open(ChatOptions(), ("old", failing), ("new", tokenizer_with(None)), [ASKED])


def test_the_old_template_needs_its_tokens_in_the_new_vocabulary() -> None:
    old, bare = chat(CHATML).tokenizer, tokenizer_with(None)
    with pytest.raises(
        LoraSuiteError, match=r"lacks a token of the old one .got <.im_start.>.; pass one, or .none. for plain text"
    ):
        ChatPair.open(ChatOptions(), ("old", old), ("new", bare), [ASKED])
    found = ChatPair.open(ChatOptions(), ("old", chat(LLAMA2).tokenizer), ("new", bare), [ASKED])
    assert found.saved_template == LLAMA2
    asked = ChatPair.open(ChatOptions(new_template=CHATML), ("old", old), ("new", bare), [ASKED])
    assert asked.saved_template == CHATML
    assert ChatPair.open(ChatOptions(), ("old", bare), ("new", bare), list(ANSWERS)).saved_template is None
