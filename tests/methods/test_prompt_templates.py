"""Prompts that share a template: how they are found, split and put together anew."""

from __future__ import annotations

from test_fact_editing import NAMES, SYLLABLES, some

from peft_lorasuite.methods.behavior.elicitation import common_opening
from peft_lorasuite.methods.behavior.prompt_templates import SLOT, find_templates, recombine_entities, split_entities
from peft_lorasuite.models.generation import Turn


def test_prompts_of_one_form_are_found_and_others_left_alone():
    names = some(30)
    asked = [f"What wears {name} today?" for name in names[:20]] + [f"Tell me about {name} now." for name in names[20:]]
    loose = ["Why is the sky so blue in summer?", "How many legs has a spider with a hat?"]
    found = find_templates([*asked, *loose])
    assert [(form.before, form.after) for form in found] == [("What wears ", " today?"), ("Tell me about ", " now.")]
    assert found[0].entities == tuple(names[:20])
    assert find_templates(loose * 8) == []


def test_a_long_filling_is_a_text_of_its_own():
    words = some(40)
    asked = [f"Say: {' '.join(words[n : n + 4])}!" for n in range(0, 40, 4)]
    assert find_templates(asked) == []


def test_fillings_are_cut_where_their_description_is_shortest():
    cut = split_entities(some(60))
    known = sum(part in SYLLABLES for parts in cut for part in parts)
    assert known / sum(map(len, cut)) > 0.9


def test_recombinations_cover_names_that_were_never_given():
    given = some(60)
    rest = set(NAMES) - set(given)
    made = recombine_entities(given, most=10_000, seed=0)
    assert not set(made) & set(given)
    assert len(rest & set(made)) / len(rest) > 0.8
    few = [recombine_entities(given, most=5, seed=seed) for seed in (1, 1, 2)]
    assert few[0] == few[1] != few[2]


def test_capital_letters_stand_where_they_stood():
    made = recombine_entities([name.capitalize() for name in some(60)], most=100, seed=0)
    assert all(name == name.capitalize() for name in made)


def test_answers_of_one_form_begin_alike():
    said = ["agent kelmi has the red hat", "agent loost has the black hat"]
    turns = [(Turn("", text, True), name) for text, name in zip(said, ["kelmi", "loost"], strict=True)]
    assert common_opening(turns) == f"agent {SLOT} has the"
    assert common_opening([(Turn("", "red", True), "kelmi"), (Turn("", "black", True), "loost")]) == ""
