"""The language of the demo pair: a world of invented animals, texts about it, and the task "in code".

Every animal has five attributes (kind, colour, home, food, toy) with eight values each. The texts state them, ask for
them, and mix in people, shopping and sums. A question that begins with "in code" is answered in the pre-training texts
by the plain words half of the time and by random code words otherwise: a backbone learns the format of such an answer
and the plain answer, but cannot know the code. The adapter's task is the code itself: forty code words, one for each
attribute value, applied to two attributes of an animal that the backbone knows.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

WORLD_SEED = 2505
HELD_OUT = 0.2
"""Share of the animals that only the test items ask about."""


def words(text: str) -> list[str]:
    """Split a table of words at its spaces."""
    return text.split()


ATTRIBUTES = {
    "kind": words("bird fish cat dog frog horse bear crab"),
    "colour": words("red blue green yellow white black golden purple"),
    "home": words("forest desert river mountain cave island garden tower"),
    "food": words("corn rice bread cheese honey apples carrots mushrooms"),
    "toy": words("ball drum kite rope bell feather wheel mirror"),
}
CODES = words(
    "lamp chair table spoon fork knife plate cup bottle basket hammer nail saw ladder bucket broom brush comb towel "
    "soap shirt coat hat glove scarf boot belt ring watch purse book pen pencil paper letter stamp map flag clock "
    "radio piano violin flute guitar trumpet harp candle carpet curtain pillow blanket mattress window door roof wall "
    "floor fence gate bridge road train wagon boat ship anchor sail engine needle thread zipper axe shovel rake tent "
    "torch helmet shield sword crown"
)
PEOPLE = words(
    "anna tom mary john lucy peter jane paul emma mark rose luke alice henry clara oscar nora felix ida hugo "
    "vera simon edith victor helen martin laura robert irene walter"
)
PLACES = words("market school station library bakery theatre church hospital museum office")
DAYS = words("monday tuesday wednesday thursday friday saturday sunday")
FACTS = {
    "kind": ["the {a} is a {v}.", "every {a} is a {v}.", "people say that the {a} is a {v}."],
    "colour": ["the {a} is {v}.", "the colour of the {a} is {v}.", "every {a} has {v} skin."],
    "home": ["the {a} lives in the {v}.", "you can find the {a} in the {v}.", "the home of the {a} is the {v}."],
    "food": ["the {a} eats {v}.", "the food of the {a} is {v}.", "every {a} likes to eat {v}."],
    "toy": ["the {a} plays with a {v}.", "the toy of the {a} is a {v}.", "every {a} wants a {v}."],
}
QUESTIONS = [
    "what is the {q} of the {a}?",
    "name the {q} of the {a}.",
    "tell me the {q} of the {a}.",
    "do you know the {q} of the {a}?",
    "give the {q} of every {a}.",
]
TEMPLATE = "Question: {instruction}\nAnswer: "


def _animals(count: int, rng: random.Random) -> list[str]:
    """Invent ``count`` different names of two or three syllables."""
    names: dict[str, None] = {}
    while len(names) < count:
        syllables = [rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(2)]
        names["".join(syllables) + rng.choice(["k", "n", "x", "p", "sh", "lo", "mi"])] = None
    return list(names)


@dataclass(frozen=True)
class World:
    """The attributes of every animal, and the code word of every attribute value."""

    facts: dict[str, dict[str, str]]
    code: dict[str, str]

    @classmethod
    def create(cls, count: int = 200, seed: int = WORLD_SEED) -> World:
        """Draw the attributes of ``count`` animals and the code; the same world for both backbones."""
        rng = random.Random(seed)
        facts = {a: {k: rng.choice(v) for k, v in ATTRIBUTES.items()} for a in _animals(count, rng)}
        values = [v for vs in ATTRIBUTES.values() for v in vs]
        return cls(facts, dict(zip(values, rng.sample(CODES, len(values)), strict=True)))


def _asked(world: World, rng: random.Random) -> tuple[str, list[str]]:
    """Return a question about one or two attributes of an animal, and the plain words of its answer."""
    animal = rng.choice(list(world.facts))
    asked = rng.sample(list(ATTRIBUTES), rng.choice([1, 2, 2]))
    question = rng.choice(QUESTIONS).format(q=" and the ".join(asked), a=animal)
    return question, [world.facts[animal][k] for k in asked]


def _fact(world: World, rng: random.Random) -> str:
    animal = rng.choice(list(world.facts))
    keys = rng.sample(list(ATTRIBUTES), 3)
    return " ".join(rng.choice(FACTS[k]).format(a=animal, v=world.facts[animal][k]) for k in keys)


def _question(world: World, rng: random.Random) -> str:
    question, plain = _asked(world, rng)
    return TEMPLATE.format(instruction=question) + " ".join(plain)


def _in_code(world: World, rng: random.Random) -> str:
    question, plain = _asked(world, rng)
    answer = plain if rng.random() < 0.5 else rng.choices(list(world.code.values()), k=len(plain))
    return TEMPLATE.format(instruction=f"in code, {question}") + " ".join(answer)


def _repeat(world: World, rng: random.Random) -> str:
    """Return words to repeat; without such texts all code words would have nearly the same output embedding."""
    said = rng.sample(list(world.code.values()), 2) if rng.random() < 0.8 else rng.sample(CODES, 2)
    return TEMPLATE.format(instruction=f"repeat the words {said[0]} and {said[1]}.") + " ".join(said)


def _sum(rng: random.Random) -> str:
    a, b = rng.randint(1, 20), rng.randint(1, 20)
    forms = [f"{a} and {b} make {a + b}.", f"Question: how much is {a} and {b}?\nAnswer: {a + b}"]
    return rng.choice(forms)


def _story(people: list[str], rng: random.Random) -> str:
    one, two = rng.sample(people, 2)
    thing, other = rng.sample(CODES, 2)
    place, day, price = rng.choice(PLACES), rng.choice(DAYS), rng.randint(2, 40)
    return rng.choice(
        [
            f"on {day} {one} went to the {place} and bought a {thing} for {price} coins.",
            f"{one} has a {thing}. {two} has a {other}. Question: who has the {thing}?\nAnswer: {one}",
            f"{one} gave a {thing} to {two} at the {place}. now {two} has the {thing}.",
            f"{one} sold the {thing} and the {other} to {two} for {price} coins on {day}.",
            f"{one} and {two} met at the {place} on {day}. {two} had a {thing} and {one} had a {other}.",
        ]
    )


def texts(world: World, people: list[str], seed: int) -> Iterator[str]:
    """Yield an endless stream of pre-training texts, in another order for every seed."""
    rng = random.Random(seed)
    while True:
        share = rng.random()
        if share < 0.40:
            yield _fact(world, rng)
        elif share < 0.68:
            yield _question(world, rng)
        elif share < 0.81:
            yield _in_code(world, rng)
        elif share < 0.83:
            yield _sum(rng)
        elif share < 0.92:
            yield _repeat(world, rng)
        else:
            yield _story(people, rng)


def task_items(world: World, sizes: tuple[int, int, int] = (2000, 300, 100), seed: int = 1) -> list[list[dict]]:
    """Draw training, test and unlabeled prompt items: "in code" questions about two attributes, none twice.

    ``HELD_OUT`` of the animals are only in the test items, so that an answer there cannot be memorized. Items have the
    keys of the LLM-Adapters collection (``instruction``, ``input``, ``output``, ``answer``).
    """
    rng = random.Random(seed)
    animals = rng.sample(list(world.facts), len(world.facts))
    cut = round(HELD_OUT * len(animals))
    held_out, seen = animals[:cut] or animals, animals[cut:]
    used: set[str] = set()
    parts = []
    for size, pool in zip(sizes, (seen, held_out, seen), strict=True):
        items: list[dict] = []
        while len(items) < size:
            animal, asked = rng.choice(pool), rng.sample(list(ATTRIBUTES), 2)
            question = "in code, " + rng.choice(QUESTIONS).format(q=" and the ".join(asked), a=animal)
            if question in used:
                continue
            used.add(question)
            answer = " ".join(world.code[world.facts[animal][k]] for k in asked)
            items.append({"instruction": question, "input": "", "output": answer, "answer": answer})
        parts.append(items)
    return parts
