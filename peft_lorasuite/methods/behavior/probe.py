"""Probe both models for `transplant` and `distill`: the old adapted model's answers, and the hidden states there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...adapters.adapter import Key
from ...linalg.lowrank import LowRank
from ...models.backbone import Backbone
from ...models.generation import Turn
from ...models.memory import free_models
from ...text.examples import BUILT_IN
from ..base import READ_NEW, READ_OLD, MethodInput
from .fact_editing import apply_update, edit_facts
from .found import describe_found
from .hints import anchor_hint, joined, length_hint
from .old_side import read_old_side
from .options import BehaviorOptions, TransplantOptions
from .positions import (
    Place,
    Tokens,
    sample_text,
    shared_prefix,
)
from .prompt_sources import plan_prompts
from .samples import Question
from .states import (
    LastLayer,
    LastProjection,
    RowPosition,
    down_projection,
    last_projection,
    read_last_layer,
)
from .targets import Head, Targets, build_targets
from .token_pairs import PlaceVocabularies, Vocabulary

Found = TypeVar("Found")
PROMPTS = 128
"""Prompts used at most, unless the option ``prompts`` says otherwise."""
LONG_ANSWER = 32
"""Answers with more tokens than this on average are long."""
SURE = 0.5
"""Confidence from which the old adapted model decides a token, whatever the target has for it in the new vocabulary."""
MAX_LEFT = 0.25
"""Share of the divergence that values of facts may leave: about 1 % where entities decide the answers, else most."""
MORE_FACTS_HINT = (
    "the prompts share a template: synthetic_prompts=800 asks the adapter about more entities, and takes far longer"
)
"""Hint in the report where facts were written: the adapter probably knows more of them."""


@dataclass(frozen=True, eq=False)
class Probe:
    """Answers and hidden states of both models, to fit or train on.

    Attributes:
        new: The new backbone.
        vocabulary: The paired tokens of both backbones at the places.
        turns: Prompts as the new model reads them, and the old adapted model's answers.
        asked: Some of the turns for the report, each with what the user asked.
        places: The positions that predict an answer.
        adapted_states: Final states of the old adapted model at the places, (places, D_o).
        plain_states: Final states of the old model at the places, (places, D_o).
        old_head: Head of the old backbone.
        new_head: Head of the new backbone.
        new_states: Output of the new model's last layer at the places, without any update, (places, D_n).
        place: The new model's last projection, if it has one whose output reaches the final norm.
        last: States around it at the places, with the fact edit.
        rows: The turns in new tokens, then other text.
        anchors: Row and position of the anchors, in prompts and then in other text: positions regularized toward the
            base model.
        anchor_states: Output of the last layer at the anchors, without any update, (anchors, D_n).
        anchor_inputs: Input of the last projection at the anchors, with the fact edit, (anchors, I).
        fact_update: Update of an early layer with the facts that the answers state, if any.
        facts: Entries of the report.
        chat_template: The chat template of the new side, if it is not the new backbone's own.
    """

    new: Backbone
    vocabulary: PlaceVocabularies
    turns: Sequence[Turn]
    asked: Sequence[Question]
    places: Sequence[Place]
    adapted_states: Tensor
    plain_states: Tensor
    old_head: Head
    new_head: Head
    new_states: Tensor
    place: LastProjection | None
    last: LastLayer
    rows: Sequence[Tokens]
    anchors: Sequence[RowPosition]
    anchor_states: Tensor
    anchor_inputs: Tensor
    fact_update: Mapping[Key, LowRank] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    chat_template: str | None = None

    @property
    def long(self) -> bool:
        """Whether the answers are long: chains of thought rather than formats and choices."""
        return len(self.places) > LONG_ANSWER * len(self.turns)

    def targets(self, options: BehaviorOptions, *, seed: int, places: Sequence[int] | None = None) -> Targets:
        """Return the target probabilities at all places, or at those with the given indices (see `targets`)."""
        rows = slice(None) if places is None else list(places)
        built_in = self.facts.get("prompts", {}).get("source") == BUILT_IN  # they may be of another task
        return build_targets(
            self.old_head, self.new_head, self.vocabulary.at(rows), self.adapted_states[rows], self.plain_states[rows],
            self.new_states[rows], options.resolve(long=self.long), seed=seed, sure_only=built_in and not self.long,
        )  # fmt: skip

    def answers_kept(self, targets: Targets, places: Sequence[int] | None = None) -> float:
        """Return the share of the answers that the adapter decides in full.

        In the others the old adapted model is not sure of a token, and the target has one that the new model prefers.
        """
        used = range(len(self.places)) if places is None else places
        best = targets.ids[targets.log_probs[: len(used)].argmax(dim=1)].tolist()
        sure = (targets.confidence[: len(used)] >= SURE).tolist()
        kept: dict[int, bool] = {}
        for number, token, is_sure in zip(used, best, sure, strict=True):
            turn, _, position = self.places[number]
            kept[turn] = kept.get(turn, True) and (is_sure or token == self.rows[turn].predicted(position))
        return sum(kept.values()) / len(kept)


def probe(inputs: MethodInput, options: TransplantOptions, turns: Sequence[Turn] | None = None) -> Probe:
    """Generate the old adapted model's answers, and compute the states of both models that a fit needs.

    Args:
        inputs: Input of the method.
        options: Options of `transplant`; for `distill`, those of the `transplant` that it starts from.
        turns: Answers to use instead of generating them.
    """
    return probe_and(inputs, options, lambda _, probed: probed, turns)


def probe_and(
    inputs: MethodInput, options: TransplantOptions, then: Callable[[Any, Probe], Found],
    turns: Sequence[Turn] | None = None,
) -> Found:  # fmt: skip
    """Do what `probe` does, and return ``then(model, probed)``, called while the new model is loaded."""
    old, new = inputs.backbones("the method 'transplant'")
    Vocabulary.pair(old, new)  # refuses vocabularies that share too little before any model is loaded
    count = options.prompts or PROMPTS
    choose = plan_prompts(inputs, old, new, count, options.length, options.samples) if turns is None else None
    with inputs.stage(READ_OLD):
        side = read_old_side(inputs, old, new, options, choose, turns)
    chosen, turns, rows, places = side.chosen, side.turns, side.rows, side.places
    side.head.release(old)
    free_models()
    anchors = _draw_anchors(rows, options.anchor_tokens, inputs.seed)
    texts = sample_text(new, options.anchor_text_tokens, inputs.seed)
    anchors += [(len(rows) + number, at) for number, text in enumerate(texts) for at in range(1, len(text.ids))]
    with new.running() as model:
        with inputs.stage(READ_NEW):
            new_head = Head(model, new)
            place = last_projection(model, new, new_head)
            reads = place or new_head.norm_path or new.arch.head
            last, anchored = _probe_new(model, reads, rows + texts, len(rows), places, anchors, inputs)
            probed = Probe(
                new, side.vocabulary, turns, side.asked, places, side.adapted, side.plain, side.head, new_head,
                new_states=last.h, place=place, last=last, rows=rows + texts, anchors=anchors,
                anchor_states=anchored.h, anchor_inputs=anchored.x,
                facts=joined(
                    {"hints": length_hint(turns, options.length) + anchor_hint(len(anchors), options.anchor_tokens)},
                    chosen.facts() if chosen else {},
                    {"samples_held_out": True} if chosen and chosen.extra else {},
                    describe_found((old, side.head), (new, new_head), model, place),
                ),
                chat_template=chosen.chat.saved_template if chosen else None,
            )  # fmt: skip
            if options.edit_facts and new.arch.has(0, "down"):  # no converter, or experts: no early layer to write to
                probed = _with_fact_edit(model, probed, inputs, options)
        found = then(model, probed)
    del model, probed
    free_models()
    return found


def _with_fact_edit(model: Any, probed: Probe, inputs: MethodInput, options: TransplantOptions) -> Probe:
    """Write the facts that the answers state into an early layer, and read the new model again with that update."""

    def targets_at(places: Sequence[int]) -> Targets:
        return probed.targets(options, seed=inputs.seed, places=places)

    edit = edit_facts(
        model, probed.new, probed.new_head, probed.turns, probed.places, targets_at, seed=inputs.seed,
        progress=inputs.progress,
    )  # fmt: skip
    if edit is None or probed.place is None:
        return probed
    layer, update, figures = edit
    if figures["divergence_left"] > MAX_LEFT * figures["divergence"]:
        return replace(probed, facts={**probed.facts, "fact_edit": {**figures, "written": False}})
    with apply_update(down_projection(model, probed.new, layer), update):
        last, anchored = _probe_new(
            model, probed.place, probed.rows, len(probed.turns), probed.places, probed.anchors, inputs
        )
    hints = [] if options.synthetic_prompts else [MORE_FACTS_HINT]
    facts = joined(probed.facts, {"fact_edit": figures, "hints": hints})
    return replace(probed, last=last, anchor_inputs=anchored.x, fact_update={(layer, "down"): update}, facts=facts)


def _draw_anchors(rows: Sequence[Tokens], count: int, seed: int) -> list[RowPosition]:
    """Draw prompt positions after the prefix that all prompts share."""
    common = shared_prefix(rows)
    positions = [(turn, position) for turn, row in enumerate(rows) for position in row.reading if position >= common]
    order = torch.randperm(len(positions), generator=torch.Generator().manual_seed(seed)).tolist()
    return [positions[number] for number in order[:count]]


def _probe_new(
    model: Any, reads: LastProjection | str, rows: Sequence[Tokens], turns: int, places: Sequence[Place],
    anchors: Sequence[RowPosition], inputs: MethodInput,
) -> tuple[LastLayer, LastLayer]:  # fmt: skip
    """Read the last layer at ``places`` and at ``anchors``; the first ``turns`` rows share a prefix, others do not."""
    wanted = [*((turn, position) for turn, _, position in places), *anchors]
    in_turns = [one for one in wanted if one[0] < turns]
    in_text = [(row - turns, position) for row, position in wanted if row >= turns]
    states = read_last_layer(model, reads, rows[:turns], in_turns, inputs.progress)
    if in_text:
        text = read_last_layer(model, reads, rows[turns:], in_text, inputs.progress)
        states = LastLayer(*(torch.cat(pair) for pair in zip(states, text, strict=True)))
    return states.at(slice(len(places))), states.at(slice(len(places), None))
