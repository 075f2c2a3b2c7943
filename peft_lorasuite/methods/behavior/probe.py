"""What `transplant` and `distill` read off both models: the old adapted model's answers and the states behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import as_file, files
from typing import Any

import torch
from torch import Tensor

from ...adapters.adapter import Key
from ...linalg.lowrank import LowRank
from ...models.backbone import Backbone
from ...models.generation import Turn, Written, answered, encoded, fits
from ...models.memory import free_models
from ...text.examples import check_enough, read_prompts
from ..base import Job, check_bounds
from .elicitation import elicit
from .fact_editing import memorise, updated
from .positions import Place, Tokens, adapted, aligned, beginning, merging, other_text, tokens
from .states import At, LastLayer, down_of, final_states, last_layer
from .targets import Head, Teacher, Vocabulary, teach

LEAST: dict[str, float] = {
    "prompts": 2, "length": 1, "top": 1, "extra": 0, "trust": 0, "share": 0, "quiet": 0, "text": 0, "recombine": 0,
}  # fmt: skip
"""Smallest values of the options that both methods have."""
MOST = {"share": 1}
"""And the largest."""
TOKENS = 32
"""Answers with more tokens than this on average are long."""
TOP, TOP_LONG = 64, 32
"""Candidate tokens per position: long answers have so many positions that fewer of each show as many."""
SHARE_LONG = 0.5
"""Of the old adapted model in the target of long answers."""
MORE = "the prompts share a form: recombine=800 asks the adapter about more than they name, and takes far longer"
"""Hint in the report, where facts were written of which the adapter probably knows more."""
CUT = "most answers go on after {0} tokens: the option length={1} reads more of them"
"""Hint in the report, where the old adapted model did not come to an end."""


@dataclass(frozen=True)
class ReadingOptions:
    """How both models are read.

    Attributes:
        prompts: Prompts used at most, drawn by the seed.
        length: Tokens of a response at most.
        top: Candidate tokens per position; by default 64, of long answers 32.
        extra: Further candidate tokens.
        trust: Entropy in nats below which the old adapted model's own probabilities become the target, where the
            adapter changed them; 0 asks for the difference alone. See `teacher.teach`.
        share: Share of the old adapted model's own probabilities in the target, sure or not, where the adapter changed
            them; instead of ``trust``, if not 0. By default a half for long answers and 0 for short ones.
        quiet: Prompt positions used, at which no change is wanted.
        text: Tokens of the built-in text used, about, at which none is wanted either; 3000 let an upgrade disturb
            other text a sixth to two fifths less, for .001 to .01 nats on the task.
        memory: Write what the answers say about the fillings of a form into an early layer (see `memory`).
        recombine: Further prompts, put together from the given ones where these share a form, about what the old
            adapted model is surest of; see `elicitation`.
    """

    prompts: int = 128
    length: int = 48
    top: int | None = None
    extra: int = 1000
    trust: float = 0.5
    share: float | None = None
    quiet: int = 1000
    text: int = 0
    memory: bool = True
    recombine: int = 0

    def __post_init__(self) -> None:
        check_bounds(self, LEAST, MOST)


@dataclass(frozen=True, eq=False)
class Reading:
    """What was read off both models, once, for whatever is fitted or trained on it.

    Attributes:
        new: The new backbone.
        vocabulary: Tokens that both sides share.
        turns: Prompts and the old adapted model's answers.
        places: The positions that predict an answer.
        adapted: The old adapted model's final states there.
        plain: The old model's.
        old_head: Head of the old backbone.
        new_head: Head of the new one.
        before: Output of the new model's last layer there, as it is.
        last: Its last layer there, with what was memorised.
        rows: The turns in new tokens, then other text.
        still: Positions that read prompts, then other text, where no change is wanted: row and position.
        still_before: Output of the last layer at ``still``, as it is.
        quiet: Input of the last down projection at ``still``, with what was memorised.
        memory: Update of an early layer that knows the facts, if the answers told any.
        facts: What is worth a line in the report.
    """

    new: Backbone
    vocabulary: Vocabulary
    turns: Sequence[Turn]
    places: Sequence[Place]
    adapted: Tensor
    plain: Tensor
    old_head: Head
    new_head: Head
    before: Tensor
    last: LastLayer
    rows: Sequence[Tokens]
    still: Sequence[At]
    still_before: Tensor
    quiet: Tensor
    memory: Mapping[Key, LowRank] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def long(self) -> bool:
        """Whether the answers are chains of thought rather than formats and choices."""
        return len(self.places) > TOKENS * len(self.turns)

    def teacher(
        self, options: ReadingOptions, *, gate: float, seed: int, places: Sequence[int] | None = None
    ) -> Teacher:
        """Return the wanted probabilities at every place or, by their numbers, at some (see `teacher.teach`)."""
        rows = slice(None) if places is None else list(places)
        top, share = options.top or (TOP_LONG if self.long else TOP), options.share
        if share is None:
            share = SHARE_LONG if self.long and options.trust else 0.0
        return teach(
            self.old_head, self.new_head, self.vocabulary, self.adapted[rows], self.plain[rows], self.before[rows],
            gate=gate, trust=options.trust, share=share, top=top, extra=options.extra, seed=seed,
        )  # fmt: skip


def read(job: Job, options: ReadingOptions, turns: Sequence[Turn] | None = None) -> Reading:
    """Let the old adapted model answer (or take given answers), and read off both models what the fit needs."""
    old, new = job.backbones("transplant")
    vocabulary = Vocabulary.of(old, new)
    turns, adapted_states, plain_states, old_head, places = _read_old(job, old, new, options, turns)
    old_head.let_go(old)
    free_models()
    rows = [tokens(new, turn) for turn in turns]
    still = _still(rows, options.quiet, job.seed)
    texts = other_text(new, options.text, job.seed)
    still += [(len(rows) + number, at) for number, text in enumerate(texts) for at in range(1, len(text.ids))]
    with new.running() as model:
        last, quiet = _read_new(model, new, rows + texts, len(rows), places, still, job)
        reading = Reading(
            new, vocabulary, turns, places, adapted_states, plain_states, old_head, Head(model, new), before=last.h,
            last=last, rows=rows + texts, still=still, still_before=quiet.h, quiet=quiet.x,
            facts=_cut(turns, options.length),
        )  # fmt: skip
        reading = _remembering(model, reading, job, options) if options.memory else reading
    del model
    free_models()
    return reading


def _cut(turns: Sequence[Turn], length: int) -> dict[str, Any]:
    """Say so where most answers were cut."""
    ended = sum(turn.ended for turn in turns)
    return {"hints": [CUT.format(length, 4 * length)]} if 2 * ended < len(turns) else {}


def _remembering(model: Any, reading: Reading, job: Job, options: ReadingOptions) -> Reading:
    """Memorise what the answers say about the fillings of a form, and read the new model again with that in place."""

    def ask(places: Sequence[int]) -> Teacher:
        return reading.teacher(options, gate=0.0, seed=job.seed, places=places)

    found = memorise(
        model, reading.new, reading.new_head, reading.turns, reading.places, ask, seed=job.seed, progress=job.progress
    )
    if found is None:
        return reading
    layer, update, told = found
    last, quiet = _read_new(
        model, reading.new, reading.rows, len(reading.turns), reading.places, reading.still, job, (layer, update)
    )
    hints = [*reading.facts.get("hints", []), *([] if options.recombine else [MORE])]
    facts = {"memory": told} | ({"hints": hints} if hints else {})
    return replace(reading, last=last, quiet=quiet.x, memory={(layer, "down"): update}, facts=facts)


def chosen_prompts(job: Job, old: Backbone, count: int, length: int) -> list[str]:
    """Return the caller's prompts, or the built-in ones that fit the old context, at most ``count``, by the seed.

    Raises:
        LoraSuiteError: For too few prompts, or one of the caller's that is too long, by its number among all of them.
    """
    if job.prompts is not None:
        prompts = check_enough(read_prompts(job.prompts))
        encoded(old, prompts, length)  # all of them, so that a long one is told by the caller's number
    else:
        with as_file(files("peft_lorasuite").joinpath("data/prompts.jsonl")) as path:
            ours = [prompt for prompt in read_prompts(path) if fits(old, prompt, length)]
        prompts = check_enough(ours, "give prompts of your own, none longer than the old backbone's context")
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(job.seed)).tolist()
    return [prompts[number] for number in sorted(order[:count])]


def _read_old(
    job: Job, old: Backbone, new: Backbone, options: ReadingOptions, given: Sequence[Turn] | None
) -> tuple[Sequence[Turn], Tensor, Tensor, Head, list[Place]]:
    """Let the old adapted model answer, then read its final states with and without the adapter."""
    prompts = chosen_prompts(job, old, options.prompts, options.length) if given is None else []
    with adapted(old, job.adapter) as model:
        found = _answers(model, old, prompts, job, options) if given is None else [(turn, None) for turn in given]
        turns = [turn for turn, _ in found]
        if prompts and merging(model, old, prompts):
            turns = [replace(turn, merges=True) for turn in turns]
        rows = [tokens(old, turn) for turn in turns]
        places = aligned(rows, [tokens(new, turn) for turn in turns])
        wanted = [(turn, position) for turn, position, _ in places]
        states = final_states(model, rows, wanted, _kept(rows, [written for _, written in found]), job.progress)
    del model
    free_models()
    with old.running() as plain:
        return turns, states, final_states(plain, rows, wanted, {}, job.progress), Head(plain, old), places


def _answers(
    model: Any, old: Backbone, prompts: list[str], job: Job, options: ReadingOptions
) -> list[tuple[Turn, Written]]:
    """Let the old adapted model answer the prompts, and those that it adds to them."""
    if options.recombine:
        prompts += elicit(
            model, old, prompts, count=options.recombine, length=options.length, seed=job.seed, progress=job.progress
        )
    return answered(model, old, prompts, length=options.length, progress=job.progress)


def _kept(rows: Sequence[Tokens], written: Sequence[Written | None]) -> dict[tuple[int, int], Tensor]:
    """Return the final states at which answers were written, where their text reads back as the same tokens."""
    return {
        (turn, row.start - 1 + step): state
        for turn, (row, one) in enumerate(zip(rows, written, strict=True))
        if one is not None and row.ids[row.start :] == one.ids
        for step, state in enumerate(one.states)
    }


def _still(rows: Sequence[Tokens], count: int, seed: int) -> list[At]:
    """Draw positions that read the prompts, behind what all of them begin with."""
    common = beginning(rows)
    unmoved = [(turn, position) for turn, row in enumerate(rows) for position in row.reading if position >= common]
    order = torch.randperm(len(unmoved), generator=torch.Generator().manual_seed(seed)).tolist()
    return [unmoved[number] for number in order[:count]]


def _read_new(
    model: Any, new: Backbone, rows: Sequence[Tokens], turns: int, places: Sequence[Place], still: Sequence[At],
    job: Job, memory: tuple[int, LowRank] | None = None,
) -> tuple[LastLayer, LastLayer]:  # fmt: skip
    """Read the last layer at ``places`` and at ``still``; other text apart from the turns, which begin alike."""
    wanted = [*((turn, position) for turn, _, position in places), *still]
    inside = [one for one in wanted if one[0] < turns]
    outside = [(row - turns, position) for row, position in wanted if row >= turns]
    at, update = memory or (0, None)
    with updated(down_of(model, new, at), update):
        found = last_layer(model, new, rows[:turns], inside, job.progress)
        if outside:
            text = last_layer(model, new, rows[turns:], outside, job.progress)
            found = LastLayer(*(torch.cat(pair) for pair in zip(found, text, strict=True)))
    return found.at(slice(len(places))), found.at(slice(len(places), None))
