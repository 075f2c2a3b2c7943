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
from ...text.examples import Prompt
from ..base import MethodInput
from .elicitation import synthesize_prompts
from .options import BehaviorOptions
from .positions import Place, Tokens, align, covered_positions, merges_prompt_end, pair_places, tokenize
from .prompt_sources import Choice
from .prompts import ChosenPrompts
from .states import RowPosition, read_final_states
from .targets import SMALLEST, Head, token_log_probs
from .token_pairs import PlaceVocabularies


@dataclass(frozen=True, eq=False)
class OldSide:
    """Answers and states of the old backbone.

    Attributes:
        chosen: The prompts, None where answers were given.
        turns: Prompts as the new model reads them, and the old adapted model's answers.
        rows: The turns in new tokens.
        places: The positions that predict an answer in both tokenizers.
        vocabulary: The paired tokens at the places.
        adapted: Final states of the adapted model at the places, (places, D_o).
        plain: Final states without the adapter, (places, D_o).
        head: Head of the old backbone.
    """

    chosen: ChosenPrompts | None
    turns: Sequence[Turn]
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
        rows, new_rows = [tokenize(old, turn) for turn in old_turns], [tokenize(new, turn) for turn in new_turns]
        places = align(rows, new_rows)
        covered = covered_positions(rows, new_rows, places)
        further = list(dict.fromkeys(one for several in covered for one in several))
        wanted = [*((turn, position) for turn, position, _ in places), *further]
        states = read_final_states(model, rows, wanted, _known_states(rows, generated), inputs.progress)
    del model
    free_models()
    with old.running() as plain:
        plain_states = read_final_states(plain, rows, wanted, {}, inputs.progress)
        head, count = Head(plain, old), len(places)
        tokens = torch.tensor([rows[turn].predicted(position) for turn, position in further], dtype=torch.long)
        found = torch.stack([token_log_probs(head, one[count:], tokens) for one in (states, plain_states)], dim=1)
    index = {one: number for number, one in enumerate(further)}
    place, at = torch.tensor(
        [(number, index[one]) for number, several in enumerate(covered) for one in several], dtype=torch.long
    ).reshape(-1, 2).T  # fmt: skip
    # below 0, which stands for none
    sums = torch.zeros(count, 2).index_add_(0, place, found[at].clamp_max(-SMALLEST))
    vocabulary = replace(PlaceVocabularies.pair(old, new, pair_places(rows, new_rows, places)), further=sums)
    return OldSide(chosen, new_turns, new_rows, places, vocabulary, states[:count], plain_states[:count], head)


def _answer(
    model: Any, old: Backbone, chosen: ChosenPrompts, inputs: MethodInput, options: BehaviorOptions
) -> tuple[list[Turn], list[Turn], Sequence[Generated | None]]:
    """Answer the prompts and, if asked for, synthetic ones; return the turns of both models."""
    prompts: list[Prompt] = list(chosen.prompts)
    if options.synthetic_prompts:
        prompts += synthesize_prompts(
            model, old, prompts, count=options.synthetic_prompts, length=options.length, seed=inputs.seed,
            write=chosen.chat.old.write, progress=inputs.progress,
        )  # fmt: skip
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
