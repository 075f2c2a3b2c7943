"""Prompts that the old models write: headers, sampling, what is kept, and upgrades with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from chat_pair import ANSWERS, CHATML, LLAMA2, conversations, share_right, tokenizer_with
from pico import pico_model, save_backbone

from peft_lorasuite import LoraSuiteError, MapOptions, UpgradeMap, from_upgraded, upgrade, upgrade_many
from peft_lorasuite.adapters.peft_model import load_with_adapter
from peft_lorasuite.adapters.reading import read_adapter
from peft_lorasuite.cli.main import main
from peft_lorasuite.io.source import Source
from peft_lorasuite.methods.behavior.answer_scores import NO_ANSWER, AnswerScore, score_answers
from peft_lorasuite.methods.behavior.own_prompts import ADAPTER, BASE, Writer, Written, distinct
from peft_lorasuite.model import attach
from peft_lorasuite.models.backbone import Backbone
from peft_lorasuite.progress import no_progress
from peft_lorasuite.text.chat import Chat
from peft_lorasuite.text.examples import read_records
from peft_lorasuite.text.formats import Format
from peft_lorasuite.text.headers import UserHeader
from peft_lorasuite.training.encoding import encode_examples
from peft_lorasuite.training.loop import train
from peft_lorasuite.training.options import FinetuneOptions

SURE: dict[str, Any] = {"length": 6, "prompts": 16}
DISTILL = SURE | {"epochs": 60, "learning_rate": 1e-2, "anchor_text_tokens": 100}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Backbone, Backbone, Path, UpgradeMap]:
    """A pair of models that can be sure, and an adapter that was trained with a loss on prompts and answers."""
    root, tokenizer = tmp_path_factory.mktemp("pair"), tokenizer_with(LLAMA2, bos=True)
    models = pico_model("llama", seed=1), pico_model("llama", seed=2, hidden_size=48, intermediate_size=64)
    for model in models:
        model.lm_head.weight.data *= 8
    old = Backbone.open(save_backbone(root / "old", models[0], tokenizer_with(None, bos=True)))
    new = Backbone.open(save_backbone(root / "new", models[1], tokenizer_with(CHATML, chatml=True, bos=True)))
    records: Any = read_records(conversations(labeled=True))
    rows = encode_examples(tokenizer, records, None, chat=Chat("old", tokenizer))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted = peft.get_peft_model(old.load(), config)
        options = FinetuneOptions(samples=None, epochs=120, batch_size=8, learning_rate=5e-3)
        train(adapted, [replace(row, start=1, prompts=frozenset()) for row in rows], 0, options, no_progress)
    adapted.save_pretrained(str(root / "adapter"))
    tokenizer.save_pretrained(root / "adapter")
    return old, new, root / "adapter", UpgradeMap.build(old, new, MapOptions(layer_map="first"))


def header(name: str, template: str | None = None) -> UserHeader:
    tokenizer = tokenizer_with(template, chatml=template == CHATML, bos=template != CHATML)
    return UserHeader.of(Format.read(name), Chat("old", tokenizer))


@pytest.mark.parametrize(
    ("name", "template", "text", "end"),
    [
        ("chat", CHATML, "<|im_start|>user\n", "<|im_end|>"),
        ("chat", LLAMA2, "<s>[INST]", "[/INST]"),
        ("question", None, "Question:", "Answer:"),
        ("vicuna", None, "USER:", "ASSISTANT:"),
        ("plain", None, "", "\n"),
    ],
)
def test_the_header_is_what_stands_before_the_users_text(name: str, template: str | None, text: str, end: str) -> None:
    found = header(name, template)
    assert (str(found.text), found.ends[0]) == (text, end)
    assert getattr(found.text, "rendered", False) is (name == "chat")


def test_a_text_of_its_own_begins_as_texts_do_in_training() -> None:
    tokenizer = tokenizer_with(None)
    found = UserHeader.of(Format.read("plain"), Chat("old", tokenizer))
    assert found.text == (tokenizer.bos_token or tokenizer.eos_token)


def test_a_text_ends_where_the_format_goes_on() -> None:
    alpaca = header("alpaca")
    assert alpaca.text.endswith("### Instruction:\n")
    assert alpaca.cut("red cat.\n\n### Response:\nblue", ended=True) == "red cat."
    assert alpaca.cut("red cat.\n\n### Input:\nblue", ended=True) == "red cat."
    assert alpaca.cut(" red cat. blue", ended=True) == "red cat. blue"
    assert alpaca.cut("red cat. blue dog? the s", ended=False) == "red cat. blue dog?"
    assert alpaca.cut("red cat", ended=False) == ""


def test_a_template_that_writes_no_user_text_has_no_header() -> None:
    with pytest.raises(LoraSuiteError, match="old: the chat template does not write the user's text"):
        header("chat", "{% for m in messages %}{{ m['role'] }}{% endfor %}")


def test_near_duplicates_and_texts_without_letters_are_left_out() -> None:
    long = " ".join(f"w{number}" for number in range(60))
    texts = ["Red cat.", "red cat", "red dog", "1 + 2", "", long, f"{long} end", long.replace("w3 ", "other ")]
    kept = distinct([Written(text, BASE) for text in texts], [Written("Blue!", ADAPTER)])
    assert [one.text for one in kept] == ["Red cat.", "red dog", long]
    assert not distinct([Written("blue", BASE)], [Written("Blue!", ADAPTER)])


def test_the_gain_is_bounded_and_falls_with_the_entropy() -> None:
    known, task = AnswerScore(change=9.0, entropy=1.0), AnswerScore(change=2.0, entropy=0.1)
    assert task.gain > known.gain
    assert AnswerScore(0.0, 0.0).gain == 0
    assert AnswerScore.mean([known, task]) == AnswerScore(5.5, 0.55)
    assert AnswerScore.mean([known, NO_ANSWER]) == AnswerScore(9.0, 1.0, answered=0.5)
    assert NO_ANSWER.gain == NO_ANSWER.sureness == AnswerScore.mean([NO_ANSWER]).gain == 0


def test_both_models_write_by_the_seed_and_the_adapter_writes_its_prompts(pair: Any) -> None:
    old, _, folder, _ = pair
    chat = Chat("old", tokenizer_with(LLAMA2, bos=True))
    starts = [(UserHeader.of(Format.read("chat"), chat), "")] * 40
    adapter = read_adapter(Source(str(folder), "adapter"), old.arch)
    with load_with_adapter(old, adapter, merge=False) as model:
        state = torch.get_rng_state()
        first, again, other = (
            [one.text for one in Writer(model, old, sorted({*chat.special_ids, 0}), seed).write(starts, adapted=True)]
            for seed in (0, 0, 1)
        )
        plain = Writer(model, old, sorted({*chat.special_ids, 0})).write(starts, adapted=False)
        assert torch.equal(torch.get_rng_state(), state)
        known, foreign = score_answers(model, old, [chat.write(one) for one in _asked("red cat", "sun sun hat")])
    assert first == again != other
    assert len(set(first) & set(ANSWERS)) >= 4
    assert not {one.text for one in plain} & set(ANSWERS)
    assert known.change > 1
    assert known.entropy < foreign.entropy


def _asked(*texts: str) -> list[Any]:
    return [Format.read("chat").write(one) for one in read_records([{"question": t, "answer": "-"} for t in texts])]


def test_an_upgrade_with_own_prompts(pair: Any, tmp_path: Path) -> None:
    old, new, adapter, built = pair
    settings: dict[str, Any] = {"method": "distill", "options": DISTILL, "chat": {"format": "chat"}}
    found = upgrade(adapter, built, old=old, new=new, prompts="self", **settings)
    facts = found.report.facts
    assert facts["prompts"]["source"] == "self"
    assert facts["prompts"]["sampled"] == 64
    assert 8 <= facts["prompts"]["kept"] <= 16
    assert facts["prompts"]["from_adapter"] > 0.5
    assert facts["chat"]["conversations"] == facts["prompts"]["kept"]
    assert share_right(attach(new.load(), found), new) >= 0.5
    (outcome,) = upgrade_many([str(adapter)], built, tmp_path, old=old, new=new, prompts="self", **settings)
    assert outcome.status == "done"


def test_own_prompts_replace_the_built_in_ones_where_they_are_better(pair: Any) -> None:
    old, new, adapter, built = pair
    settings: dict[str, Any] = {"method": "transplant", "options": SURE | {"refine_steps": 1}}
    found: Any = from_upgraded(new.name, adapter, source_model=old.name, upgrade_map=built, **settings)
    facts = found.upgrade_report.facts
    assert facts["prompts"]["source"] == "self"
    asked = upgrade(adapter, built, old=old, new=new, prompts="built-in", **settings)
    assert asked.report.facts["prompts"] == {"source": "built-in"}


def test_own_prompts_by_command(pair: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new, adapter, built = pair
    built.save(tmp_path / "map")
    words = [
        "distill",
        adapter,
        "--from",
        old.name,
        "--to",
        new.name,
        "--map",
        tmp_path / "map",
        "-o",
        tmp_path / "out",
    ]
    words += ["--prompts", "self", "--format", "chat", "--json"]
    words += [word for name in ("length=6", "prompts=8", "epochs=1") for word in ("--set", name)]
    assert main([str(word) for word in words]) == 0
    assert '"source": "self"' in capsys.readouterr().out
