"""What the adapters of the gate's points teach: the demo's code, a format, and names that nobody can know."""

from __future__ import annotations

import random
from collections.abc import Callable

import demo_language as language
from demo_pair import DATA, PROMPTS

from peft_lorasuite.text.examples import Example, read_examples

Items = tuple[list[Example], list[Example], int]
"""Training items, test items, and how many of the former may serve as prompts."""


def code() -> Items:
    """Return the demo's own items: forty code words, applied to what the backbone knows."""
    return read_examples(DATA / "train.json"), read_examples(DATA / "test.json"), PROMPTS


def format_() -> Items:
    """Return the same questions without "in code", answered in another order and with articles: a mere form."""
    facts = language.World.create().facts

    def plain(item: Example) -> Example:
        question = item.instruction.removeprefix("in code, ")
        words = question.rstrip(".?").split()
        first, second = (word for word in words if word in language.ATTRIBUTES)
        known = facts[words[-1]]
        answer = f"the {known[second]} and the {known[first]}"
        return Example(question, answer, answer=answer)

    train, test, prompts = code()
    return [plain(item) for item in train], [plain(item) for item in test], prompts


def names() -> Items:
    """Return questions after invented names, two words for every animal.

    Every name is among the training items, so that retraining can know it; the prompts are about one half of the
    animals, and the test items, in another wording, about the other half.
    """
    facts, draw = language.World.create().facts, random.Random(3)
    given = {animal: " ".join(draw.sample(language.CODES, 2)) for animal in facts}
    asked = [
        "name the {a}.",
        "give the name of the {a}.",
        "tell me the name of the {a}.",
        "what is the name of the {a}?",
    ]
    animals = list(facts)
    half = len(animals) // 2

    def items(chosen: list[str], forms: list[str]) -> list[Example]:
        return [Example(form.format(a=one), given[one], answer=given[one]) for form in forms for one in chosen]

    prompted, others = (items(chosen, asked[:3]) for chosen in (animals[:half], animals[half:]))
    return prompted + others, items(animals[half:], asked[3:]), len(prompted)


TASKS: dict[str, Callable[[], Items]] = {"code": code, "format": format_, "names": names}
"""Task -> its items."""
