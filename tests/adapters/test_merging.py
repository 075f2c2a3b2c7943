"""Adapters of texts in which one token spans the prompt's end and the response's beginning."""

from __future__ import annotations

import peft
import pytest
import torch
from pico import unrelated_pair

from peft_lorasuite import Backbone, MapOptions, UpgradeMap, finetune, upgrade
from peft_lorasuite.adapters.peft_model import load_with_adapter
from peft_lorasuite.adapters.reading import read_adapter
from peft_lorasuite.io.source import Source
from peft_lorasuite.methods.behavior.positions import merges_prompt_end
from peft_lorasuite.model import attach

WORDS = ["red", "blue", "tree", "stone", "river", "cloud", "small", "big", "runs", "sleeps"]
BEGUN = [f" the {a} {b}" for a in WORDS[:4] for b in WORDS[4:8]]
PROMPTS = [f"{begun} r" for begun in BEGUN]
"""Their last token is a piece: with what the adapter answers, ``ed``, it makes one token of a whole word."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two unrelated pico backbones, and adapters of the old one: one finishes the word, one begins the next."""
    root = tmp_path_factory.mktemp("pair")
    old, new = unrelated_pair(root, WORDS)
    tokenizer = Backbone.open(root / "old").tokenizer
    for name, answer in (("finishes", "ed stone"), ("follows", " big stone")):
        config = peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = peft.get_peft_model(Backbone.open(root / "old").load(), config)
        taught = [{"instruction": prompt, "output": answer} for prompt in PROMPTS]
        options = {"samples": None, "epochs": 60, "learning_rate": 1e-2, "template": "{instruction}"}
        finetune(model, taught, tokenizer=tokenizer, **options).save_pretrained(root / name)
    return root, UpgradeMap.build(old, new, MapOptions(layer_map="first"))


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize(("name", "expected"), [("finishes", True), ("follows", False)])
def test_an_adapter_shows_whether_it_learnt_longer_tokens(pair, name, expected, in_memory):
    old = Backbone.open(pair[0] / "old")
    old = Backbone.open(old.load()) if in_memory else old
    with load_with_adapter(old, read_adapter(Source(str(pair[0] / name), "adapter"), old.arch)) as model:
        assert merges_prompt_end(model, old, PROMPTS) == expected
    assert not merges_prompt_end(old.load(), old, PROMPTS)


@pytest.mark.parametrize(
    ("method", "training"), [("transplant", {}), ("distill", {"epochs": 30, "learning_rate": 1e-2})]
)
def test_the_longer_token_is_carried_over(pair, method, training):
    """No answer has it: they are written after the whole prompt."""
    root, upgrade_map = pair
    new = Backbone.open(root / "new")
    upgraded = upgrade(
        root / "finishes", upgrade_map, method=method, old=root / "old", new=root / "new", prompts=PROMPTS,
        options={"length": 4, "extra": 50, **training},
    )  # fmt: skip
    model, (red,) = attach(new.load(), upgraded), new.tokenizer(" red")["input_ids"]
    ids = torch.tensor([new.tokenizer(begun)["input_ids"] for begun in BEGUN])
    with torch.no_grad():
        before, after = (one(ids).logits[:, -1].softmax(-1)[:, red] for one in (new.load(), model.eval()))
    assert before.mean() < 0.05
    assert after.mean() > 0.3
