"""The format that an adapter was trained on, found by asking the adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from chat_pair import ANSWERS, LLAMA2, conversations, tokenizer_with, write_pair
from pico import pico_model, save_backbone

from peft_lorasuite import LoraSuiteError, MapOptions, UpgradeMap, upgrade
from peft_lorasuite.adapters.peft_model import load_with_adapter
from peft_lorasuite.adapters.reading import read_adapter
from peft_lorasuite.io.source import Source
from peft_lorasuite.methods.behavior.answer_scores import AnswerScore
from peft_lorasuite.methods.behavior.formats import FormatTrial
from peft_lorasuite.models.backbone import Backbone
from peft_lorasuite.text.chat_options import ChatOptions
from peft_lorasuite.text.chat_pair import ChatPair
from peft_lorasuite.text.examples import read_prompts
from peft_lorasuite.text.formats import CHAT, TEMPLATES, Format
from peft_lorasuite.text.record_types import Example
from peft_lorasuite.training.finetune import finetune

EXAMPLES = [Example(question, text) for question, text in ANSWERS.items()]


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    folder = tmp_path_factory.mktemp("old")
    return Backbone.open(save_backbone(folder, pico_model("llama", seed=1), tokenizer_with(LLAMA2, bos=True)))


@pytest.mark.parametrize("name", [CHAT, "alpaca", "plain", "vicuna"])
def test_the_adapter_tells_the_format_that_it_was_trained_on(old: Backbone, name: str, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        fresh = peft.get_peft_model(old.load(), config)
    data: Any = conversations(labeled=True) if name == CHAT else EXAMPLES
    trained = finetune(
        fresh, data, tokenizer=old.tokenizer, samples=None, epochs=40, batch_size=8, learning_rate=5e-3,
        template=TEMPLATES.get(name),
    )  # fmt: skip
    trained.save_pretrained(tmp_path)
    sides = ("old", old.tokenizer), ("new", old.tokenizer)
    trial = FormatTrial.of_records(
        [Example(one.instruction) for one in EXAMPLES], ChatPair.open(ChatOptions(), *sides, [])
    )
    assert list(trial.texts) == [*TEMPLATES, CHAT]
    adapter = read_adapter(Source(str(tmp_path), "adapter"), old.arch)
    with load_with_adapter(old, adapter, merge=False) as model:
        trial.read(model, old)
    assert trial.choose() == name
    assert set(trial.facts(name)["format"]["scores"]) == set(trial.texts)


def test_a_format_in_which_most_answers_are_empty_does_not_win() -> None:
    """Measured on a real adapter of conversations: to plain text it says nothing, to one prompt of eight its format."""
    scores = {CHAT: AnswerScore(2.473, 0.353), "plain": AnswerScore(6.769, 0.001, answered=1 / 8)}
    trial = FormatTrial({}, scores)
    assert trial.choose(CHAT) == CHAT
    assert trial.warning() is None
    assert FormatTrial({}, scores | {"plain": AnswerScore(6.769, 0.001)}).choose(CHAT) == "plain"


def test_given_prompts_in_another_format_are_warned_about(tmp_path: Path) -> None:
    old, new, adapter = write_pair(tmp_path)
    built = UpgradeMap.build(old, new, MapOptions(layer_map="first"))

    def report(prompts: Any, **chat: Any) -> Any:
        options = {"length": 6, "refine_steps": 1}
        return upgrade(
            adapter, built, method="transplant", options=options, old=old, new=new, prompts=prompts, chat=chat
        ).report  # fmt: skip

    fitting = report(conversations(labeled=False))
    assert fitting.facts["format"]["used"] == "chat"
    assert "warnings" not in fitting.facts
    strings = report(list(ANSWERS))
    assert strings.facts["format"]["used"] == "given"
    (warning,) = strings.facts["warnings"]
    assert "probably trained on prompts in the format 'chat'" in warning
    assert warning in strings.verdict
    asked = report(list(ANSWERS), format="chat")  # strings are user turns then
    assert asked.facts["chat"]["conversations"] == len(ANSWERS)
    assert "format" not in asked.facts
    assert report(None, format="question").facts["format"] == {"used": "question"}


def test_a_format_is_a_name_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("Q {instruction} A")
    form = Format.read(tmp_path / "mine.txt")
    assert (form.name, form.template) == ("mine.txt", "Q {instruction} A")
    records = [{"instruction": "Add.", "input": "1 2"}, {"question": "Why?"}, "as it is"]
    assert read_prompts(records, form=form) == ["Q Add.\n\n1 2 A", "Q Why? A", "as it is"]
    turns = read_prompts(records, form=Format.read("chat"))
    assert [turn.question for turn in turns] == ["Add.\n\n1 2", "Why?", "as it is"]  # pyright: ignore[reportAttributeAccessIssue]
    assert [turn.number for turn in turns] == [1, 2, 3]  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(LoraSuiteError, match=r"format: unknown format .got 'chatml', wanted auto, chat, alpaca"):
        ChatOptions(format="chatml")
    (tmp_path / "none.txt").write_text("no place")
    with pytest.raises(LoraSuiteError, match=r"has no .instruction."):
        Format.read(tmp_path / "none.txt")
