"""What a probe reads of the old side: the adapted model's answers, and the final states behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...adapters.peft_model import load_with_adapter, merge_adapter
from ...models.backbone import Backbone
from ...models.generation import Generated, Turn, generate_answers
from ...models.memory import free_models
from ...text.conversations import Conversation
from ...text.examples import Prompt
from ..base import MethodInput
from .continuations import deciding_positions
from .elicitation import synthesize_prompts
from .options import BehaviorOptions
from .positions import Place, Tokens, align, covered_positions, merges_prompt_end, pair_places, tokenize
from .prompt_sources import Choice
from .prompts import ChosenPrompts
from .samples import Question
from .shifts import SMALLEST
from .states import RowPosition, read_final_states
from .targets import Head, token_log_probs
from .token_pairs import PlaceVocabularies


@dataclass(frozen=True, eq=False)
class OldSide:
    """Answers and states of the old backbone.

    Attributes:
        chosen: The prompts, None where answers were given.
        turns: Prompts as the new model reads them, and the old adapted model's answers.
        asked: Turns for the sample answers of the report, each with what the user asked: such that the method is not
            fitted to, if there are more prompts than it uses, and otherwise some of ``turns``.
        rows: The turns in new tokens.
        places: The positions that predict an answer in both tokenizers.
        vocabulary: The paired tokens at the places.
        adapted: Final states of the adapted model at the places, (places, D_o).
        plain: Final states without the adapter, (places, D_o).
        head: Head of the old backbone.
    """

    chosen: ChosenPrompts | None
    turns: Sequence[Turn]
    asked: list[Question]
    rows: list[Tokens]
    places: list[Place]
    vocabulary: PlaceVocabularies
    adapted: Tensor
    plain: Tensor
    head: Head


def read_old_side(
    inputs: MethodInput, old: Backbone, new: Backbone, options: BehaviorOptions, choose: Choice | None,
    turns: Sequence[Turn] | None,
) -> OldSide:  # fmt: skip
    """Generate the old adapted model's answers, and compute the final states with and without the adapter.

    Args:
        inputs: Input of the method.
        old: The old backbone.
        new: The new backbone.
        options: Options of the method.
        choose: Chooses the prompts; None where ``turns`` are given.
        turns: Answers to use instead of generating them.
    """
    with load_with_adapter(old, inputs.adapter, merge=False) as adapted:
        chosen = choose(adapted) if choose else None
        model = merge_adapter(adapted, old)
        del adapted
        if chosen is None:
            old_turns = new_turns = list(turns or [])
            generated: Sequence[Generated | None] = [None] * len(old_turns)
        else:
            old_turns, new_turns, generated = _answer(model, old, chosen, inputs, options)
        asked = _asked(chosen, new_turns, options.samples)
        fitted = len(new_turns) if chosen is None else len(new_turns) - chosen.extra
        old_turns, new_turns, generated = old_turns[:fitted], new_turns[:fitted], generated[:fitted]
        rows, new_rows = [tokenize(old, turn) for turn in old_turns], [tokenize(new, turn) for turn in new_turns]
        places = align(rows, new_rows)
        covered = covered_positions(rows, new_rows, places)
        pairs = PlaceVocabularies.pair(old, new, pair_places(rows, new_rows, places))
        later = deciding_positions(old, new, rows, places, pairs)
        own = [(turn, position) for turn, position, _ in places]
        further = list(dict.fromkeys(one for several in (*covered, *later) for one in several))
        wanted = list(dict.fromkeys([*own, *further]))
        states = read_final_states(model, rows, wanted, _known_states(rows, generated), inputs.progress)
    del model
    free_models()
    with old.running() as plain:
        plain_states = read_final_states(plain, rows, wanted, {}, inputs.progress)
        head, index = Head(plain, old), {one: number for number, one in enumerate(wanted)}
        tokens = torch.tensor([rows[turn].predicted(position) for turn, position in further], dtype=torch.long)
        at = torch.tensor([index[one] for one in further], dtype=torch.long)
        found = torch.stack([token_log_probs(head, one[at], tokens) for one in (states, plain_states)], dim=1)
    # below 0, which stands for none
    read = dict(zip(further, found.clamp_max(-SMALLEST), strict=True))
    pairs = replace(pairs, further=_sum_each(read, covered, 0.0), afterwards=_sum_each(read, later, torch.nan))
    at = torch.tensor([index[one] for one in own])
    return OldSide(chosen, new_turns, asked, new_rows, places, pairs, states[at], plain_states[at], head)


def _asked(chosen: ChosenPrompts | None, turns: Sequence[Turn], count: int) -> list[Question]:
    """Return turns with an answer, each with its prompt: of a conversation the last user turn."""
    prompts = [turn.prompt for turn in turns] if chosen is None else chosen.prompts
    if chosen is not None and chosen.extra:
        prompts, turns = prompts[-chosen.extra :], turns[-chosen.extra :]
    texts = (one.question if isinstance(one, Conversation) else str(one) for one in prompts)
    return [(text, turn) for text, turn in zip(texts, turns, strict=False) if turn.content.strip()][:count]


def _sum_each(values: dict[RowPosition, Tensor], wanted: Sequence[Sequence[RowPosition]], empty: float) -> Tensor:
    """Return the sum of each place's values, (places, 2)."""
    none = torch.full((2,), empty)
    return torch.stack([torch.stack([values[one] for one in some]).sum(dim=0) if some else none for some in wanted])


def _answer(
    model: Any, old: Backbone, chosen: ChosenPrompts, inputs: MethodInput, options: BehaviorOptions
) -> tuple[list[Turn], list[Turn], Sequence[Generated | None]]:
    """Answer the prompts and, if asked for, synthetic ones; return the turns of both models."""
    prompts: list[Prompt] = list(chosen.prompts)
    if options.synthetic_prompts:
        known = prompts[: chosen.fitted]
        made = synthesize_prompts(
            model, old, known, count=options.synthetic_prompts, length=options.length, seed=inputs.seed,
            write=chosen.chat.old.write, progress=inputs.progress,
        )  # fmt: skip
        prompts = [*known, *made, *prompts[chosen.fitted :]]
        chosen = replace(chosen, prompts=prompts)
    texts = chosen.old_texts
    answers = generate_answers(
        model, old, texts, length=options.length, stops=chosen.stops, progress=inputs.progress
    )  # fmt: skip
    turns = [turn for turn, _ in answers]
    plain = [text for text, prompt in zip(texts, prompts, strict=True) if isinstance(prompt, str)]
    if plain and merges_prompt_end(model, old, plain):  # what a chat template writes ends in markup
        turns = [replace(turn, merges=isinstance(one, str)) for turn, one in zip(turns, prompts, strict=True)]
    return *chosen.both_turns(turns), [generated for _, generated in answers]


def _known_states(rows: Sequence[Tokens], generated: Sequence[Generated | None]) -> dict[RowPosition, Tensor]:
    """Return the final states known from generation, where the text of a response tokenizes to the generated ids."""
    return {
        (turn, row.start - 1 + step): state
        for turn, (row, one) in enumerate(zip(rows, generated, strict=True))
        if one is not None and row.ids[row.start :] == one.ids
        for step, state in enumerate(one.states)
    }
