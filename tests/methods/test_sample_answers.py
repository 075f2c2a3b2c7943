"""Sample answers in the report: they are those of the models themselves, and can be left out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chat_pair import conversations, write_pair
from test_transplant import PROMPTS, SMALL, carry
from test_transplant import pair as plain_pair

from peft_lorasuite import Backbone, MapOptions, UpgradeMap, upgrade
from peft_lorasuite.adapters.peft_model import load_with_adapter
from peft_lorasuite.adapters.reading import read_adapter
from peft_lorasuite.io.source import Source
from peft_lorasuite.methods.behavior.positions import Tokens
from peft_lorasuite.methods.behavior.probe import Probe
from peft_lorasuite.methods.behavior.targets import Targets
from peft_lorasuite.model import attach
from peft_lorasuite.models.generation import answer

pair = plain_pair


@pytest.mark.parametrize("method", ["transplant", "distill"])
def test_samples_are_what_the_three_models_answer(pair: tuple[Path, Any], method: str) -> None:
    root, _ = pair
    more = {"epochs": 1, "learning_rate": 1e-2} if method == "distill" else {"rank": 16}
    upgraded = carry(pair, method=method, options={**SMALL, **more})
    samples = upgraded.report.facts["samples"]
    assert len(samples) == 10
    prompts = [f" {sample['prompt']}" for sample in samples]
    assert set(prompts) <= set(PROMPTS)
    old, new = Backbone.open(root / "old"), Backbone.open(root / "new")
    with load_with_adapter(old, read_adapter(Source(str(root / "adapter"), "adapter"), old.arch)) as adapted:
        said = {"old": answer(adapted, old, prompts, length=6)}
    said["base"] = answer(new.load(), new, prompts, length=6)
    said["upgraded"] = answer(attach(new.load(), upgraded).eval(), new, prompts, length=6)
    for name, turns in said.items():
        assert [sample[name] for sample in samples] == [turn.response.strip() for turn in turns], name
    assert said["base"] != said["upgraded"]


@pytest.mark.parametrize("method", ["transplant", "distill"])
def test_samples_are_of_prompts_that_are_left_out_where_there_are_more(pair: tuple[Path, Any], method: str) -> None:
    """The fit is the same as without samples, and the report says that it has not seen them."""
    options = {**SMALL, "prompts": 6, **({"epochs": 1} if method == "distill" else {})}
    upgraded = carry(pair, method=method, options=options)
    facts, plain = upgraded.report.facts, carry(pair, method=method, options={**options, "samples": 0})
    assert facts[method]["prompts"] == 6
    assert facts["samples_held_out"]
    fitted = torch.randperm(len(PROMPTS), generator=torch.Generator().manual_seed(0))[:6].tolist()
    assert not {f" {sample['prompt']}" for sample in facts["samples"]} & {PROMPTS[number] for number in fitted}
    assert len(facts["samples"]) == 10
    assert "samples_held_out" not in plain.report.facts
    for key, update in plain.adapter.updates.items():
        assert torch.equal(update.A, upgraded.adapter.updates[key].A)
        assert torch.equal(update.B, upgraded.adapter.updates[key].B)


def test_no_samples_where_none_are_wanted(pair: tuple[Path, Any]) -> None:
    facts = carry(pair, method="transplant", options={**SMALL, "samples": 0}).report.facts
    assert "samples" not in facts
    assert "samples" not in carry(pair, method="lorasuite").report.facts


def test_a_sample_of_a_conversation_has_the_user_s_words(tmp_path: Path) -> None:
    old, new, adapter = write_pair(tmp_path)
    built, asked = UpgradeMap.build(old, new, MapOptions(layer_map="first")), conversations(labeled=False)
    options = {"length": 6, "samples": 2}
    upgraded = upgrade(adapter, built, method="transplant", options=options, old=old, new=new, prompts=asked)
    samples = upgraded.report.facts["samples"]
    words = {record["messages"][-1]["content"] for record in asked}
    assert len(samples) == 2
    assert {sample["prompt"] for sample in samples} <= words
    assert all("<" not in sample["old"] for sample in samples)


@pytest.mark.parametrize("method", ["transplant", "distill"])
def test_the_target_of_a_trained_adapter_has_most_of_its_answers(tmp_path: Path, method: str) -> None:
    old, new, adapter = write_pair(tmp_path)
    upgraded = upgrade(
        adapter, UpgradeMap.build(old, new, MapOptions(tokens=256)), method=method, old=old, new=new,
        prompts=conversations(labeled=False),
        options={"length": 6, "samples": 0, **({"epochs": 1} if method == "distill" else {})},
    )  # fmt: skip
    assert upgraded.report.facts[method]["answers_kept"] > 0.8


def test_an_answer_is_kept_if_the_target_has_each_token_or_the_old_model_is_sure() -> None:
    ids, rows = torch.tensor([5, 6, 7]), [Tokens((1, 5, 6), (), 1, True, end=7), Tokens((1, 6), (), 1, True, end=7)]
    places = [(0, 0, 0), (0, 1, 1), (0, 2, 2), (1, 0, 0), (1, 1, 1)]
    probed = SimpleNamespace(places=places, rows=rows)

    def kept(*likeliest: int, places: list[int] | None = None, sure: float = 0.4) -> float:
        log_probs = torch.nn.functional.one_hot(torch.tensor(likeliest) - 5, 3).float().log_softmax(-1)
        return Probe.answers_kept(probed, Targets(ids, log_probs, torch.full((len(likeliest),), sure)), places)

    assert kept(5, 6, 7, 6, 7) == 1
    assert kept(5, 6, 7, 5, 7) == 0.5
    assert kept(5, 6, 6, 6, 5) == 0
    assert kept(5, 6, 7, 6, 7, 5, 5) == 1  # anchors follow
    assert kept(5, 7, places=[0, 4]) == 1
    assert kept(5, 6, 6, 6, 5, sure=0.9) == 1  # the adapter decides: another token is the target's fault
