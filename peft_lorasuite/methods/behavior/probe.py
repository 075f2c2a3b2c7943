"""Probe both models for `transplant` and `distill`: the old adapted model's answers, and the hidden states there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import as_file, files
from typing import Any

import torch
from torch import Tensor

from ...adapters.adapter import Key
from ...adapters.peft_model import load_with_adapter
from ...linalg.lowrank import LowRank
from ...models.backbone import Backbone
from ...models.generation import Generated, Turn, encode_prompts, fits_context, generate_answers
from ...models.memory import free_models
from ...text.examples import check_prompt_count, read_prompts
from ..base import MethodInput
from .elicitation import synthesize_prompts
from .fact_editing import apply_update, edit_facts
from .options import BehaviorOptions, TransplantOptions
from .positions import Place, Tokens, align, merges_prompt_end, sample_text, shared_prefix, tokenize
from .states import LastLayer, RowPosition, down_projection, read_final_states, read_last_layer
from .targets import Head, Targets, Vocabulary, build_targets

LONG_ANSWER = 32
"""Answers with more tokens than this on average are long."""
MORE_FACTS_HINT = (
    "the prompts share a template: synthetic_prompts=800 asks the adapter about more entities, and takes far longer"
)
"""Hint in the report where facts were written: the adapter probably knows more of them."""
CUT_ANSWERS_HINT = "most answers were cut after {0} tokens: the option length={1} reads more of them"
"""Hint in the report where most answers of the old adapted model did not end."""


@dataclass(frozen=True, eq=False)
class Probe:
    """Answers and hidden states of both models, to fit or train on.

    Attributes:
        new: The new backbone.
        vocabulary: The paired tokens of both backbones.
        turns: Prompts and the old adapted model's answers.
        places: The positions that predict an answer.
        adapted_states: Final states of the old adapted model at the places, (places, D_o).
        plain_states: Final states of the old model at the places, (places, D_o).
        old_head: Head of the old backbone.
        new_head: Head of the new backbone.
        new_states: Output of the new model's last layer at the places, without any update, (places, D_n).
        last: States around the new model's last ``down`` projection at the places, with the fact edit.
        rows: The turns in new tokens, then other text.
        anchors: Row and position of the anchors, in prompts and then in other text: positions regularized toward the
            base model.
        anchor_states: Output of the last layer at the anchors, without any update, (anchors, D_n).
        anchor_inputs: Input of the last ``down`` projection at the anchors, with the fact edit, (anchors, I).
        fact_update: Update of an early layer with the facts that the answers state, if any.
        facts: Entries of the report.
    """

    new: Backbone
    vocabulary: Vocabulary
    turns: Sequence[Turn]
    places: Sequence[Place]
    adapted_states: Tensor
    plain_states: Tensor
    old_head: Head
    new_head: Head
    new_states: Tensor
    last: LastLayer
    rows: Sequence[Tokens]
    anchors: Sequence[RowPosition]
    anchor_states: Tensor
    anchor_inputs: Tensor
    fact_update: Mapping[Key, LowRank] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def long(self) -> bool:
        """Whether the answers are long: chains of thought rather than formats and choices."""
        return len(self.places) > LONG_ANSWER * len(self.turns)

    def targets(self, options: BehaviorOptions, *, seed: int, places: Sequence[int] | None = None) -> Targets:
        """Return the target probabilities at all places, or at those with the given indices (see `targets`)."""
        rows = slice(None) if places is None else list(places)
        return build_targets(
            self.old_head, self.new_head, self.vocabulary, self.adapted_states[rows], self.plain_states[rows],
            self.new_states[rows], options.resolve(long=self.long), seed=seed,
        )  # fmt: skip


def probe(inputs: MethodInput, options: TransplantOptions, turns: Sequence[Turn] | None = None) -> Probe:
    """Generate the old adapted model's answers, and compute the states of both models that a fit needs.

    Args:
        inputs: Input of the method.
        options: Options of `transplant`; for `distill`, those of the `transplant` that it starts from.
        turns: Answers to use instead of generating them.
    """
    old, new = inputs.backbones("the method 'transplant'")
    vocabulary = Vocabulary.pair(old, new)
    turns, adapted_states, plain_states, old_head, places = _probe_old(inputs, old, new, options, turns)
    old_head.release(old)
    free_models()
    rows = [tokenize(new, turn) for turn in turns]
    anchors = _draw_anchors(rows, options.anchor_tokens, inputs.seed)
    texts = sample_text(new, options.anchor_text_tokens, inputs.seed)
    anchors += [(len(rows) + number, at) for number, text in enumerate(texts) for at in range(1, len(text.ids))]
    with new.running() as model:
        last, anchored = _probe_new(model, new, rows + texts, len(rows), places, anchors, inputs)
        probed = Probe(
            new, vocabulary, turns, places, adapted_states, plain_states, old_head, Head(model, new), new_states=last.h,
            last=last, rows=rows + texts, anchors=anchors, anchor_states=anchored.h, anchor_inputs=anchored.x,
            facts=_length_hint(turns, options.length),
        )  # fmt: skip
        probed = _with_fact_edit(model, probed, inputs, options) if options.edit_facts else probed
    del model
    free_models()
    return probed


def _length_hint(turns: Sequence[Turn], length: int) -> dict[str, Any]:
    """Return a hint for the report where most answers were cut."""
    ended = sum(turn.ended for turn in turns)
    return {"hints": [CUT_ANSWERS_HINT.format(length, 4 * length)]} if 2 * ended < len(turns) else {}


def _with_fact_edit(model: Any, probed: Probe, inputs: MethodInput, options: TransplantOptions) -> Probe:
    """Write the facts that the answers state into an early layer, and read the new model again with that update."""
    ungated = replace(options, entropy_gate=0.0)

    def targets_at(places: Sequence[int]) -> Targets:
        return probed.targets(ungated, seed=inputs.seed, places=places)

    edit = edit_facts(
        model, probed.new, probed.new_head, probed.turns, probed.places, targets_at, seed=inputs.seed,
        progress=inputs.progress,
    )  # fmt: skip
    if edit is None:
        return probed
    layer, update, figures = edit
    last, anchored = _probe_new(
        model, probed.new, probed.rows, len(probed.turns), probed.places, probed.anchors, inputs, (layer, update)
    )
    hints = [*probed.facts.get("hints", []), *([] if options.synthetic_prompts else [MORE_FACTS_HINT])]
    facts = {"fact_edit": figures} | ({"hints": hints} if hints else {})
    return replace(probed, last=last, anchor_inputs=anchored.x, fact_update={(layer, "down"): update}, facts=facts)


def choose_prompts(inputs: MethodInput, old: Backbone, count: int, length: int) -> list[str]:
    """Draw at most ``count`` of the caller's prompts or, without any, of the built-in ones that fit the old context.

    Raises:
        LoraSuiteError: For too few prompts, and for a prompt of the caller that is too long.
    """
    if inputs.prompts is not None:
        prompts = check_prompt_count(read_prompts(inputs.prompts))
        encode_prompts(old, prompts, length)  # checks all of them, so that the error has the caller's number
    else:
        with as_file(files("peft_lorasuite").joinpath("data/prompts.jsonl")) as path:
            fitting = [prompt for prompt in read_prompts(path) if fits_context(old, prompt, length)]
        prompts = check_prompt_count(fitting, "pass prompts that fit the old backbone's context")
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(inputs.seed)).tolist()
    return [prompts[number] for number in sorted(order[:count])]


def _probe_old(
    inputs: MethodInput, old: Backbone, new: Backbone, options: BehaviorOptions, turns: Sequence[Turn] | None
) -> tuple[Sequence[Turn], Tensor, Tensor, Head, list[Place]]:
    """Generate the old adapted model's answers, and compute the final states with and without the adapter."""
    prompts = choose_prompts(inputs, old, options.prompts, options.length) if turns is None else []
    with load_with_adapter(old, inputs.adapter) as model:
        answers = _answer(model, old, prompts, inputs, options) if turns is None else [(turn, None) for turn in turns]
        turns = [turn for turn, _ in answers]
        if prompts and merges_prompt_end(model, old, prompts):
            turns = [replace(turn, merges=True) for turn in turns]
        rows = [tokenize(old, turn) for turn in turns]
        places = align(rows, [tokenize(new, turn) for turn in turns])
        wanted = [(turn, position) for turn, position, _ in places]
        known = _known_states(rows, [generated for _, generated in answers])
        states = read_final_states(model, rows, wanted, known, inputs.progress)
    del model
    free_models()
    with old.running() as plain:
        return turns, states, read_final_states(plain, rows, wanted, {}, inputs.progress), Head(plain, old), places


def _answer(
    model: Any, old: Backbone, prompts: list[str], inputs: MethodInput, options: BehaviorOptions
) -> list[tuple[Turn, Generated]]:
    """Answer the prompts and, if asked for, synthetic ones."""
    if options.synthetic_prompts:
        prompts += synthesize_prompts(
            model, old, prompts, count=options.synthetic_prompts, length=options.length, seed=inputs.seed,
            progress=inputs.progress,
        )  # fmt: skip
    return generate_answers(model, old, prompts, length=options.length, progress=inputs.progress)


def _known_states(rows: Sequence[Tokens], generated: Sequence[Generated | None]) -> dict[RowPosition, Tensor]:
    """Return the final states known from generation, where the text of a response tokenizes to the generated ids."""
    return {
        (turn, row.start - 1 + step): state
        for turn, (row, one) in enumerate(zip(rows, generated, strict=True))
        if one is not None and row.ids[row.start :] == one.ids
        for step, state in enumerate(one.states)
    }


def _draw_anchors(rows: Sequence[Tokens], count: int, seed: int) -> list[RowPosition]:
    """Draw prompt positions after the prefix that all prompts share."""
    common = shared_prefix(rows)
    positions = [(turn, position) for turn, row in enumerate(rows) for position in row.reading if position >= common]
    order = torch.randperm(len(positions), generator=torch.Generator().manual_seed(seed)).tolist()
    return [positions[number] for number in order[:count]]


def _probe_new(
    model: Any, new: Backbone, rows: Sequence[Tokens], turns: int, places: Sequence[Place],
    anchors: Sequence[RowPosition], inputs: MethodInput, fact_edit: tuple[int, LowRank] | None = None,
) -> tuple[LastLayer, LastLayer]:  # fmt: skip
    """Read the last layer at ``places`` and at ``anchors``; the first ``turns`` rows share a prefix, others do not."""
    wanted = [*((turn, position) for turn, _, position in places), *anchors]
    in_turns = [one for one in wanted if one[0] < turns]
    in_text = [(row - turns, position) for row, position in wanted if row >= turns]
    layer, update = fact_edit or (0, None)
    with apply_update(down_projection(model, new, layer), update):
        states = read_last_layer(model, new, rows[:turns], in_turns, inputs.progress)
        if in_text:
            text = read_last_layer(model, new, rows[turns:], in_text, inputs.progress)
            states = LastLayer(*(torch.cat(pair) for pair in zip(states, text, strict=True)))
    return states.at(slice(len(places))), states.at(slice(len(places), None))
