"""The same answer in both models: between what each chat template writes around it, up to its own end of turn."""

from __future__ import annotations

from typing import Any

import pytest
from chat_pair import CHATML, LLAMA2, tokenizer_with
from pico import pico_model

from peft_lorasuite.methods.behavior.hints import NO_ANCHORS_HINT, anchor_hint
from peft_lorasuite.methods.behavior.positions import align, pair_places, tokenize
from peft_lorasuite.methods.behavior.prompts import ChosenPrompts
from peft_lorasuite.models.backbone import Backbone
from peft_lorasuite.models.generation import Turn
from peft_lorasuite.text.chat import NO_TEMPLATE, Chat
from peft_lorasuite.text.chat_options import ChatOptions
from peft_lorasuite.text.chat_pair import ChatPair
from peft_lorasuite.text.conversations import Conversation, user_turn

THOUGHT = "<think>\n\n</think>\n\n"
THINKING = CHATML.replace(
    "{{ message['content'] }}",
    "{{ '" + THOUGHT.replace("\n", "\\n") + "' if message['role'] == 'assistant' else '' }}{{ message['content'] }}",
)
"""ChatML that writes an empty block of thoughts before an answer, as that of Qwen3 does."""
OPTIONAL = (
    "{%- set last = namespace(user=0) %}{%- for message in messages %}{%- if message.role == 'user' %}"
    "{%- set last.user = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.role == 'assistant' and loop.last and loop.index0 > last.user %}"
    "{{- '<think>\n' + (message.reasoning_content or '') + '\n</think>\n\n' }}{%- endif %}"
    "{{- message.content.lstrip('\n') + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)
"""Like the template of Qwen3: thoughts before the last answer alone, and without thinking in the generation prompt."""
ASKED = user_turn("red cat")


def backbone(template: str) -> Backbone:
    """Return a model in memory with a tokenizer that has a chat template."""
    found = Backbone.open(pico_model("llama"))
    found.__dict__["tokenizer"] = tokenizer_with(template, chatml=template != LLAMA2, bos=True)
    return found


def turns(
    old: str, new: str, response: str, *, ended: bool = True, **variables: Any
) -> tuple[Turn, Turn, Backbone, Backbone]:
    sides = backbone(old), backbone(new)
    pair = ChatPair.open(
        ChatOptions(template_kwargs=variables),
        *((name, one.tokenizer) for name, one in zip("ab", sides, strict=True)),
        [ASKED],
    )
    chosen = ChosenPrompts([ASKED], pair)
    (stop,) = chosen.stops
    end = stop if ended and stop != sides[0].tokenizer.eos_token_id else None
    (left,), (right,) = chosen.both_turns([Turn(chosen.old_texts[0], response, ended, end=end)])
    return left, right, *sides


@pytest.mark.parametrize(
    ("old", "new", "response", "content", "expected"),
    [
        (LLAMA2, CHATML, " sea tea ", "sea tea", "sea tea"),
        (LLAMA2, CHATML, "sea tea", "sea tea", "sea tea"),  # the model does not write what its template writes
        (CHATML, LLAMA2, "sea tea", "sea tea", " sea tea "),
        (THINKING, CHATML, f"{THOUGHT}sea", "sea", "sea"),
        (CHATML, THINKING, "sea", "sea", "sea"),  # answers follow the generation prompt at once
        (THINKING, THINKING, f"{THOUGHT}sea", f"{THOUGHT}sea", f"{THOUGHT}sea"),  # a part of the answer
    ],
)
def test_the_answer_is_what_both_turns_share(old: str, new: str, response: str, content: str, expected: str) -> None:
    left, right, _, side = turns(old, new, response)
    assert left.content == right.content == content
    assert right.response == expected
    assert right.prompt == side.tokenizer.apply_chat_template(
        list(ASKED.messages), add_generation_prompt=True, tokenize=False
    )
    end = "</s>" if new == LLAMA2 else "<|im_end|>"
    assert side.tokenizer.convert_ids_to_tokens(right.end) == end


@pytest.mark.parametrize(
    ("old", "new", "thinking", "response"),
    [
        (OPTIONAL, CHATML, True, f"{THOUGHT}sea tea"),
        (OPTIONAL, CHATML, False, "sea tea"),
        (CHATML, OPTIONAL, True, "sea tea"),
        (CHATML, OPTIONAL, False, "sea tea"),
        (OPTIONAL, LLAMA2, False, "sea tea"),
    ],
)
def test_an_empty_block_of_thoughts_is_no_part_of_the_answer(old: str, new: str, thinking: bool, response: str) -> None:
    """The block is in the generation prompt without thinking, and in the response with it."""
    left, right, one, other = turns(old, new, response, enable_thinking=thinking)
    assert left.content == right.content == "sea tea"
    for turn, template in ((left, old), (right, new)):
        assert turn.prompt.endswith(THOUGHT) is (template == OPTIONAL and not thinking)
    rows = [tokenize(one, left)], [tokenize(other, right)]
    places = align(*rows)
    words = {
        tuple(
            side.tokenizer.convert_ids_to_tokens(token).strip("Ġ")
            for side, token in zip((one, other), place.following, strict=True)
        )
        for place in pair_places(*rows, places)
    }
    assert ("tea", "tea") in words
    ends = ("<|im_end|>", "</s>" if new == LLAMA2 else "<|im_end|>")
    assert any(pair == ends for pair in words)
    assert not any("think" in token for pair in words for token in pair)


def test_the_loss_of_a_template_with_thoughts_covers_the_last_turn_as_it_is_written() -> None:
    side = Chat("the model", tokenizer_with(OPTIONAL, chatml=True, bos=True), variables={"enable_thinking": False})
    talk = Conversation(
        (*ASKED.messages, {"role": "assistant", "content": "blue"}, {"role": "user", "content": "sun dog"}),
        {"role": "assistant", "content": "sea tea"},
    )
    text, spans = side.assistant_spans(talk)
    assert text.count(THOUGHT) == 1
    assert [text[start:end] for start, end in spans] == ["blue<|im_end|>", "sea tea<|im_end|>"]


@pytest.mark.parametrize(("old", "new"), [(LLAMA2, CHATML), (CHATML, LLAMA2)])
def test_seam_and_end_of_turn_are_paired(old: str, new: str) -> None:
    """The first token of the answer, every further one, and all that ends it."""
    response = " sea tea " if old == LLAMA2 else "sea tea"
    left, right, one, other = turns(old, new, response)
    rows = [tokenize(one, left)], [tokenize(other, right)]
    places = align(*rows)
    found = {}
    for (_, p, q), place in zip(places, pair_places(*rows, places), strict=True):
        names = [
            side.tokenizer.convert_ids_to_tokens(token)
            for side, token in zip((one, other), place.following, strict=True)
        ]
        found[p, q] = (*names, place.starts)
    first = (rows[0][0].start - 1, rows[1][0].start - 1)
    assert found[first][:2] == (("Ġsea", "s") if old == LLAMA2 else ("s", "Ġsea"))
    assert found[first][2] == ((" ", "") if old == LLAMA2 else ("", " "))
    ends = [pair for pair in found.values() if pair[1] in ("<|im_end|>", "</s>") or pair[0] in ("<|im_end|>", "</s>")]
    if old == LLAMA2:  # the old template writes a space before its end of turn
        assert [pair[:2] for pair in ends] == [("Ġ", "<|im_end|>")]
    else:  # the new one does: both of its tokens follow the old end of turn
        assert [pair[:2] for pair in ends] == [("<|im_end|>", "Ġ"), ("<|im_end|>", "</s>")]


def test_an_answer_that_was_cut_has_no_end() -> None:
    left, right, one, other = turns(LLAMA2, CHATML, " sea tea", ended=False)
    assert not right.ended
    assert right.response == "sea tea"
    rows = [tokenize(one, left)], [tokenize(other, right)]
    places = align([*rows[0], *rows[0]], [*rows[1], *rows[1]])
    assert max(q for _, _, q in places) < len(rows[1][0].ids) - 1


TALK = Conversation(
    (
        {"role": "user", "content": "map key red cat"},
        {"role": "assistant", "content": "blue bird"},
        {"role": "user", "content": "sun dog"},
    )
)
REFUSING = CHATML.replace("{%", "{% if messages[-1].role == 'assistant' %}{{ raise_exception('no') }}{% endif %}{%", 1)
"""Does not render a conversation that ends with an answer."""
CHECKING = REFUSING.replace(
    "{% for message in messages %}",
    "{% for message in messages %}{% if message.role == 'assistant' and message.content != 'blue bird' %}"
    "{{ raise_exception('no') }}{% endif %}",
)
"""Does not render other answers either."""


@pytest.mark.parametrize("template", [CHATML, LLAMA2, OPTIONAL, REFUSING, NO_TEMPLATE])
def test_an_anchor_never_predicts_an_earlier_answer(template: str) -> None:
    """At an anchor the new model is held to its own prediction, which is not the adapter's."""
    side = backbone(CHATML if template == NO_TEMPLATE else template)
    chat = Chat("the model", side.tokenizer, NO_TEMPLATE if template == NO_TEMPLATE else None)
    row = tokenize(side, Turn(chat.write(TALK, answers=True), "sea tea", True))
    predicted = {side.tokenizer.decode([row.ids[position + 1]]).strip() for position in row.reading}
    assert not {"blue", "bird"} & predicted
    assert {"cat", "dog"} <= predicted
    answered = side.tokenizer.decode([row.ids[position + 1] for position in sorted(row.answering)])
    assert answered.strip().removesuffix("<|im_end|>").removesuffix("</s>").strip() == "blue bird"


def test_without_the_place_of_an_earlier_answer_a_prompt_has_no_anchors() -> None:
    side = backbone(CHECKING)
    row = tokenize(side, Turn(Chat("the model", side.tokenizer).write(TALK, answers=True), "sea tea", True))
    assert row.reading == []
    alone = tokenize(side, Turn(Chat("the model", side.tokenizer).write(ASKED), "sea tea", True))
    assert alone.reading


def test_prompts_without_any_anchor_give_a_hint() -> None:
    assert anchor_hint(0, 1000) == [NO_ANCHORS_HINT]
    assert not anchor_hint(3, 1000)
    assert not anchor_hint(0, 0)  # none are wanted
