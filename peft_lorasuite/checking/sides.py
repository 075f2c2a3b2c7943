"""What each side of an upgrade gives on the prompts of a check: answers, likelihoods, divergences."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..adapters.adapter import Adapter
from ..adapters.peft_model import load_with_adapter
from ..methods.behavior.positions import merges_prompt_end
from ..models.backbone import Backbone
from ..models.generation import Turn, answer
from ..models.memory import free_models
from ..progress import Progress
from ..text.chat import Chat
from ..text.examples import Prompt
from ..training.encoding import Encoded
from .answers import content, is_right
from .likelihood import Reading, read_rows, text_rows, turn_row
from .task import Task
from .written import Written


@dataclass(frozen=True, eq=False)
class Side:
    """What an adapted model gives on the prompts.

    Attributes:
        answers: Its answers.
        ended: Whether each answer stopped by itself.
        right: Whether each answer is right; empty without labels.
        confidences: Geometric mean of the probabilities of each answer's tokens; empty without labels.
        readings: Likelihoods of the reference answers or, without labels, of the old adapted model's answers.
        text: The same of the built-in text.
        rows: The tokens of ``readings``.
    """

    answers: Sequence[str]
    ended: Sequence[bool]
    right: Sequence[bool]
    confidences: Sequence[float]
    readings: Sequence[Reading]
    text: Sequence[Reading]
    rows: Sequence[Encoded]


@dataclass(frozen=True, eq=False)
class OldSide(Side):
    """The old adapted model; ``turns`` are its answers as the new model reads them, ``tokens`` their mean length."""

    turns: Sequence[Turn] = ()
    tokens: float = 0.0


def measure_old(
    old: Backbone, adapter: Adapter, choose: Callable[[Any], Task], *, length: int, seed: int, progress: Progress
) -> tuple[Task, OldSide]:
    """Choose the prompts, and let the old adapted model answer them."""
    with load_with_adapter(old, adapter, merge=False) as model:
        task = choose(model)
        chat, texts = task.chosen.chat.old, task.chosen.old_texts
        turns = answer(model, old, texts, length=length, stops=task.chosen.stops, progress=progress)
        prompts = task.chosen.prompts
        plain = [text for text, prompt in zip(texts, prompts, strict=True) if isinstance(prompt, str)]
        if plain and merges_prompt_end(model, old, plain):
            turns = [replace(turn, merges=isinstance(one, str)) for turn, one in zip(turns, prompts, strict=True)]
        old_turns, new_turns = task.chosen.both_turns(turns)
        rows = task.label_rows(old, chat) if task.labeled else [turn_row(old, turn) for turn in old_turns]
        found = _side(model, old, task, chat, turns, rows, seed, progress)
    free_models()
    tokens = sum(len(old.tokenizer(one, add_special_tokens=False)["input_ids"]) for one in found.answers)
    return task, OldSide(**vars(found), turns=new_turns, tokens=tokens / max(len(turns), 1))


def measure_new(
    written: Written, task: Task, old: OldSide, *, length: int, seed: int, progress: Progress
) -> Side:  # fmt: skip
    """Let an adapted model of the new backbone answer the prompts."""
    backbone, chat = written.backbone, task.chosen.chat.new
    turns = ask(written.model, backbone, chat, task.chosen.prompts, length, progress)
    rows = task.label_rows(backbone, chat) if task.labeled else [turn_row(backbone, turn) for turn in old.turns]
    return _side(written.model, backbone, task, chat, turns, rows, seed, progress)


def ask(
    model: Any, backbone: Backbone, chat: Chat, prompts: Sequence[Prompt], length: int, progress: Progress
) -> list[Turn]:
    """Let a model answer prompts as its side renders them."""
    ends = [chat.turn_ends(prompt) for prompt in prompts]
    stops = {one.end for one in ends if one is not None}
    texts = [chat.write(prompt) for prompt in prompts]
    return answer(model, backbone, texts, length=length, stops=stops, progress=progress)


def contents(chat: Chat, prompts: Sequence[Prompt], turns: Sequence[Turn]) -> list[str]:
    """Return answers without what the chat template writes around them."""
    return [content(turn, chat.turn_ends(prompt)) for turn, prompt in zip(turns, prompts, strict=True)]


def _side(
    model: Any, backbone: Backbone, task: Task, chat: Chat, turns: Sequence[Turn], rows: Sequence[Encoded], seed: int,
    progress: Progress,
) -> Side:  # fmt: skip
    answers = contents(chat, task.chosen.prompts, turns)
    right: list[bool] = []
    confidences: list[float] = []
    if task.labeled:
        right = [is_right(*one) for one in zip(answers, task.references, task.scored, strict=True)]
        own = read_rows(model, backbone, [turn_row(backbone, turn) for turn in turns], progress)
        confidences = [math.exp(-one.nll / max(one.tokens, 1)) for one in own]
    return Side(
        answers, [turn.ended for turn in turns], right, confidences, read_rows(model, backbone, rows, progress),
        read_rows(model, backbone, text_rows(backbone, seed), progress), rows,
    )  # fmt: skip
