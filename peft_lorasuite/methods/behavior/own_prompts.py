"""Prompts that the old models write themselves: user turns sampled behind the header of a prompt format.

A model that continues the header of a user turn writes such a turn (Magpie, arXiv 2406.08464). An adapter that was
trained with a loss on the prompts writes those of its task; any other adapter changes little of what the old model
writes. So both models write, in two rounds: the second one continues beginnings of the best texts of the first. Those
texts are kept at which the adapter changes the start of the answer and is surest of it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from ...models.backbone import Backbone
from ...models.generation import fits_context, generate_answers
from ...models.restore import fixed_seed
from ...progress import Progress, no_progress
from ...text.examples import Prompt
from ...text.headers import UserHeader
from ...text.prompt_text import PromptText
from .answer_scores import NO_ANSWER, AnswerScore, score_answers

ADAPTER, BASE = "adapter", "base"
BATCH = 128
LENGTH = 64
"""Tokens of a user's text at most."""
TEMPERATURE = 1.0
OVERSAMPLING = 4
"""Texts that are sampled for every prompt that is kept."""
CONTINUED = 0.25
"""Share of the texts of the first round that the second one continues, the best ones."""
DUPLICATE = 0.9
"""Share of common word trigrams from which on two texts are near-duplicates."""
FEWEST_LETTERS = 3

Start = tuple[UserHeader, str]
"""A header, and the beginning of a user's text, which may be empty."""


@dataclass(frozen=True)
class Written:
    """A user's text that a model wrote.

    Attributes:
        text: The text.
        model: Who wrote it: `ADAPTER` or `BASE`.
        prompt: The prompt with this text, in a format.
        score: How the adapter answers it, once that is known.
    """

    text: str
    model: str
    prompt: Prompt = ""
    score: AnswerScore = NO_ANSWER


@dataclass(eq=False)
class Writer:
    """Samples user texts from both old models.

    Attributes:
        model: A PEFT model that is not merged.
        backbone: The old backbone.
        stops: Token ids that end a text.
        seed: Seed of the sampling; another one for each call of `write`.
        progress: Shows the progress.
        sampled: How many texts were sampled so far.
    """

    model: Any
    backbone: Backbone
    stops: Sequence[int]
    seed: int = 0
    progress: Progress = no_progress
    sampled: int = 0

    def write(self, starts: Sequence[Start], *, adapted: bool) -> list[Written]:
        """Continue the starts of user turns with or without the adapter; starts that leave no room are left out."""
        name, length, found = ADAPTER if adapted else BASE, min(LENGTH, self.backbone.context // 2), []
        starts = [one for one in starts if fits_context(self.backbone, _join(*one), length)]
        self.seed, self.sampled = self.seed + 1, self.sampled + len(starts)
        with nullcontext() if adapted else self.model.disable_adapter(), fixed_seed(self.seed):
            for first in self.progress(f"sampling prompts ({name})", range(0, len(starts), BATCH)):
                chosen = starts[first : first + BATCH]
                turns = generate_answers(
                    self.model, self.backbone, [_join(*one) for one in chosen], length=length, batch=BATCH,
                    stops=self.stops, temperature=TEMPERATURE,
                )  # fmt: skip
                found += [
                    Written(header.cut(begun + turn.response, ended=turn.ended), name)
                    for (header, begun), (turn, _) in zip(chosen, turns, strict=True)
                ]
        return found


def _join(header: UserHeader, begun: str) -> str:
    rendered = isinstance(header.text, PromptText) and header.text.rendered
    return PromptText(header.text + begun, rendered=rendered) if begun else header.text


@dataclass(frozen=True)
class Target:
    """The format that prompts are written in.

    Attributes:
        headers: Its header, then others behind which the old model writes as well.
        write: Returns the prompt of a user's text.
        render: Returns what the old model reads of a prompt.
        fits: Returns whether a prompt fits the context of both backbones.
    """

    headers: Sequence[UserHeader]
    write: Callable[[str], Prompt]
    render: Callable[[Prompt], str]
    fits: Callable[[Prompt], bool]

    def rank(self, writer: Writer, drawn: Sequence[Written], known: Sequence[Written] = ()) -> list[Written]:
        """Score the texts that are no near-duplicates; return them and the known ones, the best first."""
        new = [replace(one, prompt=self.write(one.text)) for one in distinct(drawn, known)]
        new = [one for one in new if self.fits(one.prompt)]
        scores = score_answers(writer.model, writer.backbone, [self.render(one.prompt) for one in new], writer.progress)
        scored = [replace(one, score=score) for one, score in zip(new, scores, strict=True)]
        answered = [one for one in scored if one.score.answered]
        return sorted([*known, *answered], key=lambda one: -one.score.gain)


def write_prompts(writer: Writer, target: Target, count: int) -> list[Written]:
    """Sample prompts in a format, and return the ``count`` best ones, the best first."""
    half, headers = OVERSAMPLING * count // 2, target.headers
    drawn = writer.write([(headers[0], "")] * (half - half // 2), adapted=True)
    drawn += writer.write([(headers[number % len(headers)], "") for number in range(half // 2)], adapted=False)
    best = target.rank(writer, drawn)
    begun = _beginnings(best[: max(int(CONTINUED * len(best)), 1)], half, writer.seed)
    starts = [(headers[0], text) for text in begun]
    drawn = writer.write(starts[::2], adapted=True) + writer.write(starts[1::2], adapted=False)
    return target.rank(writer, drawn, best)[:count]


def _beginnings(best: Sequence[Written], count: int, seed: int) -> list[str]:
    """Return beginnings of texts, each cut after a random word but the last."""
    generator, found = random.Random(seed), []
    for number in range(count):
        words = re.findall(r"\s*\S+", best[number % len(best)].text) if best else [""]
        found.append("".join(words[: generator.randrange(len(words))]))
    return found


def distinct(texts: Sequence[Written], known: Sequence[Written] = ()) -> list[Written]:
    """Return the texts that are no near-duplicates of each other or of known ones."""
    seen, found = [_trigrams(one.text) for one in known], []
    by_gram: dict[Any, list[int]] = {}
    for number, grams in enumerate(seen):
        for gram in grams:
            by_gram.setdefault(gram, []).append(number)
    for one in texts:
        grams = _trigrams(one.text)
        rarest = sorted(grams, key=lambda gram: len(by_gram.get(gram, ())))
        # a near-duplicate lacks so few of them that it has one of these
        few = rarest[: int((1 / DUPLICATE - 1) * len(grams)) + 1]
        near = {number for gram in few for number in by_gram.get(gram, ())}
        if sum(map(str.isalpha, one.text)) < FEWEST_LETTERS or any(_overlap(grams, seen[number]) for number in near):
            continue
        for gram in grams:
            by_gram.setdefault(gram, []).append(len(seen))
        seen.append(grams)
        found.append(one)
    return found


def _trigrams(text: str) -> frozenset[tuple[str, ...]]:
    words = ["", *re.findall(r"\w+", text.casefold()), ""]
    return frozenset(zip(words, words[1:], words[2:], strict=False))


def _overlap(one: frozenset[Any], other: frozenset[Any]) -> bool:
    common = len(one & other)
    return common >= DUPLICATE * (len(one) + len(other) - common)
