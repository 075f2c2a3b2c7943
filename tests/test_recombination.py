"""Prompts of one form are put together anew from their pieces, and an adapter shows which of them it knows."""

from __future__ import annotations

import random
from itertools import product

import peft
import pytest
import torch
from pico import pico_model, pico_tokenizer, save_backbone

from peft_lorasuite import Backbone
from peft_lorasuite.adapter import read
from peft_lorasuite.behaviour import Turn, adapted
from peft_lorasuite.elicitation import common_opening, elicit
from peft_lorasuite.finetuning import finetune
from peft_lorasuite.recombination import SLOT, forms, pieces, recombined
from peft_lorasuite.source import Source

SYLLABLES = ["kel", "bra", "ost", "mi", "vun", "sar", "tep", "lo"]
NAMES = [a + b + c for a, b, c in product(SYLLABLES, repeat=3)]
COLOURS = ["red", "blue", "green", "black"]


def some(count: int, seed: int = 0) -> list[str]:
    return random.Random(seed).sample(NAMES, count)


def test_prompts_of_one_form_are_found_and_others_left_alone():
    names = some(30)
    asked = [f"What wears {name} today?" for name in names[:20]] + [f"Tell me about {name} now." for name in names[20:]]
    loose = ["Why is the sky so blue in summer?", "How many legs has a spider with a hat?"]
    found = forms([*asked, *loose])
    assert [(form.before, form.after) for form in found] == [("What wears ", " today?"), ("Tell me about ", " now.")]
    assert found[0].fillings == tuple(names[:20])
    assert forms(loose * 8) == []


def test_a_long_filling_is_a_text_of_its_own():
    words = some(40)
    asked = [f"Say: {' '.join(words[n : n + 4])}!" for n in range(0, 40, 4)]
    assert forms(asked) == []


def test_fillings_are_cut_where_their_description_is_shortest():
    cut = pieces(some(60))
    known = sum(part in SYLLABLES for parts in cut for part in parts)
    assert known / sum(map(len, cut)) > 0.9


def test_recombinations_cover_names_that_were_never_given():
    given = some(60)
    rest = set(NAMES) - set(given)
    made = recombined(given, most=10_000, seed=0)
    assert not set(made) & set(given)
    assert len(rest & set(made)) / len(rest) > 0.8
    assert recombined(given, most=5, seed=1) == recombined(given, most=5, seed=1) != recombined(given, most=5, seed=2)


def test_capital_letters_stand_where_they_stood():
    made = recombined([name.capitalize() for name in some(60)], most=100, seed=0)
    assert all(name == name.capitalize() for name in made)


def test_answers_of_one_form_begin_alike():
    said = ["agent kelmi has the red hat", "agent loost has the black hat"]
    turns = [(Turn("", text, True), name) for text, name in zip(said, ["kelmi", "loost"], strict=True)]
    assert common_opening(turns) == f"agent {SLOT} has the"
    assert common_opening([(Turn("", "red", True), "kelmi"), (Turn("", "black", True), "loost")]) == ""


@pytest.fixture(scope="module")
def knowing(tmp_path_factory):
    """A pico backbone with an adapter that was taught a colour for each of forty names."""
    root = tmp_path_factory.mktemp("knowing")
    tokenizer = pico_tokenizer([*COLOURS, "wears"])
    save_backbone(root / "old", pico_model("llama", seed=1), tokenizer)
    names, rng = some(40), random.Random(1)
    taught = [{"instruction": f" who is {name} ?", "output": f" wears {rng.choice(COLOURS)}"} for name in names]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(pico_model("llama", seed=1), config)
        finetune(
            model, taught, samples=None, epochs=60, learning_rate=1e-2, tokenizer=tokenizer, template="{instruction}"
        )
    model.save_pretrained(root / "adapter")
    return root, names


def test_an_adapter_shows_what_it_knows(knowing):
    root, names = knowing
    old = Backbone.open(root / "old")
    given = [f" who is {name} ?" for name in names[:20]]
    with adapted(old, read(Source(str(root / "adapter"), "adapter"), old.arch)) as model:
        found = elicit(model, old, given, count=60, length=6, seed=0)
        assert elicit(model, old, ["unlike", " any other"], count=5, length=6, seed=0) == []
    assert len(found) == len(set(found)) == 60
    assert not set(found) & set(given)
    hidden = {f" who is {name} ?" for name in names[20:]}
    chance = 60 * 20 / (len(NAMES) - 20)
    assert len(hidden & set(found)) > 2 * chance
