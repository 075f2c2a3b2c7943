"""Adapters that were trained on conversations: each side reads them through its own chat template."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
from chat_pair import ANSWERS, LLAMA2, conversations, share_right, write_pair
from transformers import AutoTokenizer

from peft_lorasuite import LoraSuiteError, MapOptions, UpgradeMap, from_upgraded, upgrade, upgrade_many
from peft_lorasuite.hub.card import adapter_card
from peft_lorasuite.model import attach
from peft_lorasuite.models.backbone import Backbone
from peft_lorasuite.text.conversations import Conversation, spread_turns

USER = {"role": "user", "content": "red cat"}
SURE: dict[str, Any] = {"length": 6}
"""Models this small are never certain."""
OPTIONS: dict[str, dict[str, Any]] = {
    "distill": SURE | {"epochs": 60, "learning_rate": 1e-2, "anchor_text_tokens": 100},
    "transplant": SURE | {"rank": 32},
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Backbone, Backbone, Path, UpgradeMap]:
    old, new, adapter = write_pair(tmp_path_factory.mktemp("pair"))
    built = UpgradeMap.build(old, new, MapOptions(layer_map="first"))
    return Backbone.open(old), Backbone.open(new), adapter, built


def moved(pair: Any, method: str, prompts: Any, **more: Any) -> tuple[float, Any]:
    """Upgrade; return the share of right answers through the new template, and the result."""
    old, new, adapter, built = pair
    upgraded = upgrade(
        adapter, built, method=method, options=OPTIONS[method], old=old, new=new, prompts=prompts, **more
    )
    return share_right(attach(new.load(), upgraded), new), upgraded


def test_the_old_adapter_answers_through_the_template_beside_it(pair: Any) -> None:
    old, new, adapter, _ = pair
    adapted = peft.PeftModel.from_pretrained(old.load(), adapter).eval()
    assert share_right(adapted, old, LLAMA2) == 1.0
    assert share_right(old.load(), old, LLAMA2) == share_right(new.load(), new) == 0.0


def compare(pair: Any, method: str) -> float:
    """Return the share that arrives with conversations, of which at most half arrives in other forms.

    Plain text, and one rendering for both sides, teach the new model to answer prompts that nobody will send.
    """
    arrived, upgraded = moved(pair, method, conversations(labeled=False))
    assert upgraded.report.facts["chat"] == {"conversations": 8, "new_template": "new backbone", "system": None}
    assert upgraded.tokenizer is None
    same, _ = moved(pair, method, conversations(labeled=False), chat={"new_template": "old"})
    plain, _ = moved(pair, method, list(ANSWERS))
    assert max(plain, same) <= arrived / 2
    return arrived


def test_transplanted_answers_arrive_only_through_the_template_of_each_side(pair: Any) -> None:
    assert compare(pair, "transplant") > 0.3


def test_distilled_answers_arrive_only_through_the_template_of_each_side(pair: Any) -> None:
    assert compare(pair, "distill") > 0.7


def talk(*words: str) -> Conversation:
    """A conversation of turns of user and assistant."""
    return Conversation(
        tuple({"role": ("user", "assistant")[n % 2], "content": word} for n, word in enumerate(words)),
        reference={"role": "assistant", "content": "end"},
    )


def test_the_beginnings_of_a_conversation_end_in_its_user_turns() -> None:
    found = talk("a", "b", "c", "d", "e").beginnings
    assert [[message["content"] for message in one.messages] for one in found] == [["a"], [*"abc"], [*"abcde"]]
    assert [one.reference["content"] for one in found if one.reference] == ["b", "d", "end"]
    assert talk("a").beginnings == [talk("a")]
    assert not any(one.reference for one in replace(talk("a", "b", "c"), reference=None).beginnings)


def test_prompts_end_at_all_turns_of_conversations() -> None:
    """Each conversation once, at a turn of its own, and at further ones while there is room."""
    talks = [talk(f"{n}", "b", "c", "d", "e") for n in range(30)]
    lengths = [len(one.messages) for one in spread_turns(talks, 30, seed=0)]
    assert len(lengths) == 30
    assert {lengths.count(length) > 4 for length in (1, 3, 5)} == {True}
    more = spread_turns(talks, 50, seed=0)
    assert len({(one.messages[0]["content"], len(one.messages)) for one in more}) == 50
    assert len(spread_turns([*talks, "text"], 1000, seed=0)) == 91
    assert spread_turns(["a", "b"], 1, seed=0) == ["a", "b"]


def test_first_turns_of_longer_conversations_are_taught(pair: Any) -> None:
    words = list(ANSWERS)
    asked = [
        {"messages": [{"role": "user", "content": one}, {"role": "assistant", "content": ANSWERS[one]}, *last]}
        for one, other in zip(words, words[1:] + words[:1], strict=True)
        for last in [[{"role": "user", "content": other}]]
    ]
    arrived, upgraded = moved(pair, "distill", asked)
    assert upgraded.report.facts["chat"]["conversations"] == 2 * len(words)
    assert arrived > 0.7  # of single questions


def test_the_old_template_serves_a_new_model_without_one(pair: Any, tmp_path: Path) -> None:
    """Its tokenizer is then saved beside the result with that template, and the card says so."""
    old, new, adapter, built = pair
    bare = tmp_path / "bare"
    shutil.copytree(new.name, bare)
    (bare / "chat_template.jinja").unlink()
    found = upgrade(
        adapter, built, method="transplant", options=OPTIONS["transplant"], old=old, new=bare,
        prompts=conversations(labeled=False),
    )  # fmt: skip
    found.save(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == LLAMA2
    assert found.report.facts["chat"]["new_template"] == "old side"
    assert share_right(attach(Backbone.open(bare).load(), found), new, LLAMA2) > 0.3
    card = adapter_card("me/new", "org/base", found.report.to_dict())
    assert "apply_chat_template" in card
    assert "template of the old side" in card


def test_conversations_in_from_upgraded_and_in_upgrade_many(pair: Any, tmp_path: Path) -> None:
    old, new, adapter, built = pair
    settings = {"method": "transplant", "options": OPTIONS["transplant"], "prompts": conversations(labeled=False)}
    model: Any = from_upgraded(new.name, adapter, source_model=old.name, upgrade_map=built, **settings)
    assert share_right(model, new) > 0.3
    assert model.upgrade_report.facts["chat"]["conversations"] == 8
    calls = {"old": old, "new": new, **settings}
    (outcome,) = upgrade_many([str(adapter)], built, tmp_path / "out", **calls)
    assert outcome.status == "done"
    assert [one.status for one in upgrade_many([str(adapter)], built, tmp_path / "out", **calls)] == ["kept"]
    again = upgrade_many([str(adapter)], built, tmp_path / "out", chat={"new_template": "old"}, **calls)
    assert [one.status for one in again] == ["done"]  # another rendering is another result
    assert (tmp_path / "out" / outcome.folder / "chat_template.jinja").read_text() == LLAMA2


BAD: dict[str, tuple[list[dict[str, str]], dict[str, Any], str]] = {
    "role": (
        [{"role": "system", "content": "red"}, USER], {},
        r"the data, record 2: the chat template does not render: no such role here .got the roles",
    ),
    "old template": ([USER], {"old_template": "{{ messages.nothing.here }}"}, "/old, the data, record 1: the chat"),
    "new template": ([USER], {"new_template": "{% for %}"}, "/new, the data, record 1: the chat"),
    "unsafe template": ([USER], {"new_template": "{{ ''.__class__.a }}"}, "access to attribute '__class__'"),
    "too long": ([{"role": "user", "content": "red " * 200_000}], {}, "prompt 2 is too long for the context .got 2000"),
    "file": ([USER], {"new_template": "missing.jinja"}, "new_template: the chat template is not a file"),
    "variable": ([USER], {"template_kwargs": {"tokenize": True}}, "template_kwargs: not a variable of a template"),
    "option": ([USER], {"templates": "none"}, "chat: unknown option .got 'templates'"),
}  # fmt: skip
"""Kind -> messages of the second record, options, and what is said."""


@pytest.mark.parametrize("kind", BAD)
def test_bad_conversations_are_one_line(pair: Any, kind: str) -> None:
    old, new, adapter, built = pair
    messages, chat, message = BAD[kind]
    prompts = [{"messages": [USER]}, {"messages": messages}]
    with pytest.raises(LoraSuiteError, match=message) as caught:
        upgrade(adapter, built, method="transplant", old=old, new=new, prompts=prompts, chat=chat)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


def test_a_side_without_a_template_asks_for_one(pair: Any, tmp_path: Path) -> None:
    old, new, adapter, built = pair
    alone = tmp_path / "alone"
    shutil.copytree(adapter, alone)
    (alone / "chat_template.jinja").unlink()
    with pytest.raises(LoraSuiteError, match=r"old: the tokenizer has no chat template.*--old-template"):
        upgrade(alone, built, method="transplant", old=old, new=new, prompts=conversations(labeled=False))
