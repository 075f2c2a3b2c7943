"""Answers whose tokens are several tokens of the old model: what comes after the first of these is not lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pico import pico_model, pico_tokenizer, save_backbone

from peft_lorasuite import Backbone, MapOptions, UpgradeMap, finetune, upgrade
from peft_lorasuite.model import attach
from peft_lorasuite.models.generation import answer

WORDS = ["red", "blue", "gray", "pink", "sun"]
ANSWERS = {"red": "suns", "blue": "sunk", "gray": "suns", "pink": "sunk"}
TEMPLATE = "{instruction} is"
PROMPTS = [f"{word} is" for word in ANSWERS]
OPTIONS: dict[str, dict[str, Any]] = {
    "distill": {"length": 8, "epochs": 40, "learning_rate": 1e-2, "anchor_text_tokens": 100},
    "transplant": {"length": 8, "rank": 16},
}
Pair = tuple[Backbone, Backbone, Path, UpgradeMap]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The old tokenizer spells what follows ``sun``; the new one knows both words."""
    home = tmp_path_factory.mktemp("spans")
    spelled, whole = pico_tokenizer(WORDS), pico_tokenizer([*WORDS, "suns", "sunk"])
    old = save_backbone(home / "old", pico_model("llama", 1, vocab_size=len(spelled)), spelled)
    new = save_backbone(home / "new", pico_model("qwen2", 2, vocab_size=len(whole), hidden_size=48), whole)
    assert len(spelled(" suns")["input_ids"]) > len(whole(" suns")["input_ids"]) == 1
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(Backbone.open(old).load(dtype="float32"), config)
    examples = [{"instruction": word, "output": f" {answer}"} for word, answer in ANSWERS.items()]
    finetune(
        model, examples, tokenizer=spelled, template=TEMPLATE, epochs=60, batch_size=4, learning_rate=1e-2,
        output=home / "lora",
    )  # fmt: skip
    return (
        Backbone.open(old),
        Backbone.open(new),
        home / "lora",
        UpgradeMap.build(old, new, MapOptions(layer_map="first")),
    )


def right(model: Any, backbone: Backbone) -> float:
    """Return the share of right answers."""
    turns = answer(model.eval(), backbone, PROMPTS, length=8)
    return sum(turn.response.strip() == ANSWERS[word] for turn, word in zip(turns, ANSWERS, strict=True)) / len(turns)


@pytest.mark.parametrize("method", list(OPTIONS))
def test_answers_arrive_whole(method: str, pair: Pair) -> None:
    old, new, adapter, built = pair
    assert right(peft.PeftModel.from_pretrained(old.load(dtype="float32"), str(adapter)), old) == 1.0
    upgraded = upgrade(adapter, built, method=method, options=OPTIONS[method], old=old, new=new, prompts=PROMPTS)
    assert right(attach(new.load(dtype="float32"), upgraded), new) == 1.0
