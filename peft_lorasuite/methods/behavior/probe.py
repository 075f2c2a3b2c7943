"""What `transplant` and `distill` read off both models: the old adapted model's answers and hidden states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import as_file, files
from typing import Any

import torch
from torch import Tensor

from ...adapters.adapter import Key
from ...adapters.peft_model import load_adapted
from ...linalg.lowrank import LowRank
from ...models.backbone import Backbone
from ...models.generation import Generated, Turn, encode_prompts, fits_context, generate_answers
from ...models.memory import free_models
from ...text.examples import check_prompt_count, read_prompts
from ..base import MethodInput
from .elicitation import elicit
from .fact_editing import apply_update, edit_facts
from .options import BehaviorOptions, TransplantOptions
from .positions import Place, Tokens, align, merges_prompt_end, sample_text, shared_prefix, tokenize
from .states import At, LastLayer, down_projection, final_states, last_layer
from .targets import Head, Targets, Vocabulary, build_targets

LONG_ANSWER = 32
"""Answers with more tokens than this on average are long."""
MORE = "the prompts share a template: synthetic_prompts=800 asks the adapter about more entities, and takes far longer"
"""Hint in the report, where facts were written and the adapter probably knows more of them."""
CUT = "most answers were cut after {0} tokens: the option length={1} reads more of them"
"""Hint in the report, where most answers of the old adapted model did not end."""


@dataclass(frozen=True, eq=False)
class Probe:
    """What was read off both models, once, for whatever is fitted or trained on it.

    Attributes:
        new: The new backbone.
        vocabulary: Tokens that both sides share.
        turns: Prompts and the old adapted model's answers.
        places: The positions that predict an answer.
        adapted_states: The old adapted model's final states there, (places, D_o).
        plain_states: The old model's, (places, D_o).
        old_head: Head of the old backbone.
        new_head: Head of the new one.
        new_states: Output of the new model's last layer there, without any update, (places, D_n).
        last: Its last layer there, with the fact edit.
        rows: The turns in new tokens, then other text.
        anchors: Positions in prompts, then in other text, where no change is wanted: row and position.
        anchor_states: Output of the last layer at the anchors, without any update.
        anchor_inputs: Input of the last down projection at the anchors, with the fact edit.
        fact_update: Update of an early layer with the facts that the answers state, if they state any.
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
    anchors: Sequence[At]
    anchor_states: Tensor
    anchor_inputs: Tensor
    fact_update: Mapping[Key, LowRank] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def long(self) -> bool:
        """Whether the answers are chains of thought rather than formats and choices."""
        return len(self.places) > LONG_ANSWER * len(self.turns)

    def targets(self, options: BehaviorOptions, *, seed: int, places: Sequence[int] | None = None) -> Targets:
        """Return the target probabilities at every place or, by their indices, at some (see `targets`)."""
        rows = slice(None) if places is None else list(places)
        return build_targets(
            self.old_head, self.new_head, self.vocabulary, self.adapted_states[rows], self.plain_states[rows],
            self.new_states[rows], options.resolve(long=self.long), seed=seed,
        )  # fmt: skip


def probe(inputs: MethodInput, options: TransplantOptions, turns: Sequence[Turn] | None = None) -> Probe:
    """Let the old adapted model answer (or take given answers), and read off both models what the fit needs."""
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
    return {"hints": [CUT.format(length, 4 * length)]} if 2 * ended < len(turns) else {}


def _with_fact_edit(model: Any, probed: Probe, inputs: MethodInput, options: TransplantOptions) -> Probe:
    """Write the facts that the answers state into an early layer, and read the new model again with that update."""
    ungated = replace(options, entropy_gate=0.0)

    def target(places: Sequence[int]) -> Targets:
        return probed.targets(ungated, seed=inputs.seed, places=places)

    found = edit_facts(
        model, probed.new, probed.new_head, probed.turns, probed.places, target, seed=inputs.seed,
        progress=inputs.progress,
    )  # fmt: skip
    if found is None:
        return probed
    layer, update, figures = found
    last, anchored = _probe_new(
        model, probed.new, probed.rows, len(probed.turns), probed.places, probed.anchors, inputs, (layer, update)
    )
    hints = [*probed.facts.get("hints", []), *([] if options.synthetic_prompts else [MORE])]
    facts = {"fact_edit": figures} | ({"hints": hints} if hints else {})
    return replace(probed, last=last, anchor_inputs=anchored.x, fact_update={(layer, "down"): update}, facts=facts)


def choose_prompts(inputs: MethodInput, old: Backbone, count: int, length: int) -> list[str]:
    """Return the caller's prompts, or the built-in ones that fit the old context, at most ``count``, by the seed.

    Raises:
        LoraSuiteError: For too few prompts, or one of the caller's that is too long, by its number among all of them.
    """
    if inputs.prompts is not None:
        prompts = check_prompt_count(read_prompts(inputs.prompts))
        encode_prompts(old, prompts, length)  # all of them, so that a long one is told by the caller's number
    else:
        with as_file(files("peft_lorasuite").joinpath("data/prompts.jsonl")) as path:
            ours = [prompt for prompt in read_prompts(path) if fits_context(old, prompt, length)]
        prompts = check_prompt_count(ours, "give prompts of your own, none longer than the old backbone's context")
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(inputs.seed)).tolist()
    return [prompts[number] for number in sorted(order[:count])]


def _probe_old(
    inputs: MethodInput, old: Backbone, new: Backbone, options: BehaviorOptions, turns: Sequence[Turn] | None
) -> tuple[Sequence[Turn], Tensor, Tensor, Head, list[Place]]:
    """Let the old adapted model answer, then read its final states with and without the adapter."""
    prompts = choose_prompts(inputs, old, options.prompts, options.length) if turns is None else []
    with load_adapted(old, inputs.adapter) as model:
        found = _answer(model, old, prompts, inputs, options) if turns is None else [(turn, None) for turn in turns]
        turns = [turn for turn, _ in found]
        if prompts and merges_prompt_end(model, old, prompts):
            turns = [replace(turn, merges=True) for turn in turns]
        rows = [tokenize(old, turn) for turn in turns]
        places = align(rows, [tokenize(new, turn) for turn in turns])
        wanted = [(turn, position) for turn, position, _ in places]
        states = final_states(
            model, rows, wanted, _known_states(rows, [written for _, written in found]), inputs.progress
        )
    del model
    free_models()
    with old.running() as plain:
        return turns, states, final_states(plain, rows, wanted, {}, inputs.progress), Head(plain, old), places


def _answer(
    model: Any, old: Backbone, prompts: list[str], inputs: MethodInput, options: BehaviorOptions
) -> list[tuple[Turn, Generated]]:
    """Let the old adapted model answer the prompts, and those that it adds to them."""
    if options.synthetic_prompts:
        prompts += elicit(
            model,
            old,
            prompts,
            count=options.synthetic_prompts,
            length=options.length,
            seed=inputs.seed,
            progress=inputs.progress,
        )
    return generate_answers(model, old, prompts, length=options.length, progress=inputs.progress)


def _known_states(rows: Sequence[Tokens], written: Sequence[Generated | None]) -> dict[tuple[int, int], Tensor]:
    """Return the final states at which answers were written, where their text reads back as the same tokens."""
    return {
        (turn, row.start - 1 + step): state
        for turn, (row, one) in enumerate(zip(rows, written, strict=True))
        if one is not None and row.ids[row.start :] == one.ids
        for step, state in enumerate(one.states)
    }


def _draw_anchors(rows: Sequence[Tokens], count: int, seed: int) -> list[At]:
    """Draw positions that read the prompts, behind what all of them begin with."""
    common = shared_prefix(rows)
    unmoved = [(turn, position) for turn, row in enumerate(rows) for position in row.reading if position >= common]
    order = torch.randperm(len(unmoved), generator=torch.Generator().manual_seed(seed)).tolist()
    return [unmoved[number] for number in order[:count]]


def _probe_new(
    model: Any, new: Backbone, rows: Sequence[Tokens], turns: int, places: Sequence[Place], anchors: Sequence[At],
    inputs: MethodInput, fact_edit: tuple[int, LowRank] | None = None,
) -> tuple[LastLayer, LastLayer]:  # fmt: skip
    """Read the last layer at ``places`` and at ``anchors``; other text apart from the turns, which begin alike."""
    wanted = [*((turn, position) for turn, _, position in places), *anchors]
    inside = [one for one in wanted if one[0] < turns]
    outside = [(row - turns, position) for row, position in wanted if row >= turns]
    at, update = fact_edit or (0, None)
    with apply_update(down_projection(model, new, at), update):
        found = last_layer(model, new, rows[:turns], inside, inputs.progress)
        if outside:
            text = last_layer(model, new, rows[turns:], outside, inputs.progress)
            found = LastLayer(*(torch.cat(pair) for pair in zip(found, text, strict=True)))
    return found.at(slice(len(places))), found.at(slice(len(places), None))
