"""Where the prompts come from: the caller, the package, or the old models themselves."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from importlib.resources import as_file, files
from typing import Any

import torch

from ...adapters.chat_template import read_chat_template
from ...errors import LoraSuiteError
from ...models.backbone import Backbone
from ...models.generation import encode_prompts, fits_context
from ...text.chat_pair import ChatPair
from ...text.conversations import spread_turns
from ...text.examples import BUILT_IN, MAX_PROMPTS, SELF, check_prompt_count, read_prompts
from ...text.formats import ALPACA, AUTO, CHAT, TEMPLATES, Format
from ...text.headers import UserHeader
from ...text.record_types import Example, Record
from ...text.records import read_record
from ...text.sources import open_stream
from ..base import MethodInput
from .answer_scores import AnswerScore
from .formats import CLEAR, FormatTrial
from .own_prompts import ADAPTER, OVERSAMPLING, Target, Writer, Written, distinct, write_prompts
from .prompts import ChosenPrompts, check_single, open_chat

NATURAL = "question"
"""Format that most base models know: behind its header they write questions for the other formats as well."""
TRIAL = 64
"""Texts that the old model writes without the adapter, to find the format."""
LEAST_GAIN = 0.3
"""Mean gain from which on own prompts can replace the built-in ones."""

Choice = Callable[[Any], ChosenPrompts]
"""Chooses the prompts with a PEFT model of the old backbone whose adapter is not merged."""


def plan_prompts(
    inputs: MethodInput, old: Backbone, new: Backbone, count: int, length: int, samples: int = 0
) -> Choice:
    """Check the caller's prompts, and return a function that chooses at most ``count`` prompts.

    Args:
        inputs: Input of the method.
        old: The old backbone.
        new: The new backbone.
        count: Prompts at most.
        length: Tokens of an answer at most.
        samples: How many more to choose at most for the sample answers, if there are more.

    Raises:
        LoraSuiteError: For too few prompts, for a prompt of the caller that is too long, and for a conversation that a
            chat template does not render.
    """
    sources = PromptSources(inputs, old, new, count, length, samples)
    if isinstance(inputs.prompts, str) and inputs.prompts == SELF:
        return sources.own
    if isinstance(inputs.prompts, str) and inputs.prompts == BUILT_IN:
        return sources.built_in
    if inputs.prompts is None:
        named = inputs.chat.prompt_format.name != AUTO
        return sources.built_in if named else sources.best
    chosen = sources.given()

    def read(model: Any) -> ChosenPrompts:
        if chosen.trial is not None:
            chosen.trial.read(model, old)
        return chosen

    return read


class PromptSources:
    """The three sources of prompts for one upgrade; the arguments are those of `plan_prompts`."""

    def __init__(
        self, inputs: MethodInput, old: Backbone, new: Backbone, count: int, length: int, samples: int = 0
    ) -> None:
        self.inputs, self.old, self.new, self.count, self.length = inputs, old, new, count, length
        self.samples = samples

    def given(self) -> ChosenPrompts:
        """Return at most ``count`` of the caller's prompts, and others for the samples."""
        form = self.inputs.chat.prompt_format
        limit = max(self.count, MAX_PROMPTS)
        read = read_prompts(self.inputs.prompts, limit=limit, seed=self.inputs.seed, form=form)
        prompts = check_single(check_prompt_count(read))
        chat = open_chat(self.inputs, self.old, self.new, prompts)
        # checks all of them, so that the error has the caller's number
        encode_prompts(self.old, ChosenPrompts(prompts, chat).old_texts, self.length)
        drawn, extra = self._draw(prompts)
        fitted = len(drawn) - extra
        drawn = [
            *spread_turns(drawn[:fitted], self.count, self.inputs.seed),
            *spread_turns(drawn[fitted:], extra, self.inputs.seed),
        ]
        encode_prompts(self.new, [chat.new.write(prompt) for prompt in drawn], self.length)
        trial = FormatTrial.of_prompts(drawn, chat) if form.name == AUTO else None
        return ChosenPrompts(drawn, chat, trial=trial, available=len(prompts), extra=extra)

    def built_in(self, model: Any) -> ChosenPrompts:
        """Return built-in prompts in the format that was asked for, else in that of the adapter."""
        form, trial = self.inputs.chat.prompt_format, None
        records = built_in_records()
        if form.name == AUTO:
            form, trial = self.detect(model, records)
        prompts = [form.write(one) for one in records]
        chat = open_chat(self.inputs, self.old, self.new, prompts)
        prompts = [one for one in prompts if self._fits(chat, one)]
        prompts = check_prompt_count(prompts, "pass prompts that fit the context of both backbones")
        drawn, extra = self._draw(prompts)
        encode_prompts(self.new, [chat.new.write(prompt) for prompt in drawn], self.length)
        return ChosenPrompts(drawn, chat, form.name, trial, {"source": BUILT_IN}, extra=extra)

    def best(self, model: Any) -> ChosenPrompts:
        """Return built-in prompts, or own ones if the adapter answers these more surely."""
        found = self.built_in(model)
        scores = found.trial.scores if found.trial else {}
        most = CLEAR * scores[found.form].gain if found.form in scores and self._can_read(found) else 0.0
        if most >= 1:  # no prompts are better
            return found
        form, texts, trial = self.own_format(model)
        ranked = self._target(form).rank(self._writer(model), texts)
        best = ranked[: max(len(ranked) // OVERSAMPLING, 1)]
        gain = AnswerScore.mean([one.score for one in best]).gain if best else 0.0
        return self.own(model, (form, trial)) if gain >= max(most, LEAST_GAIN) else found

    def own(self, model: Any, known: tuple[Format, FormatTrial | None] | None = None) -> ChosenPrompts:
        """Return prompts that the old models write.

        Args:
            model: The old model with its adapter.
            known: Format, with the trial that found it.
        """
        start = time.perf_counter()
        form, trial = known or (self.inputs.chat.prompt_format, None)
        if form.name == AUTO:
            form, _, trial = self.own_format(model)
        writer = self._writer(model)
        best = write_prompts(writer, self._target(form), self.count)
        if len(best) < 2:
            raise LoraSuiteError(
                "the old models wrote too few prompts", got=len(best), wanted="at least 2",
                where=f"prompts {SELF!r} in the format {form.name!r}",
                do="pass prompts of the task (prompts=, --prompts)",
            )  # fmt: skip
        chat = open_chat(self.inputs, self.old, self.new, [one.prompt for one in best])
        mean = AnswerScore.mean([one.score for one in best])
        origin = {
            "source": SELF, "sampled": writer.sampled, "kept": len(best),
            "from_adapter": round(sum(one.model == ADAPTER for one in best) / len(best), 3),
            "change": round(mean.change, 3), "entropy": round(mean.entropy, 3),
            "seconds": round(time.perf_counter() - start, 1),
        }  # fmt: skip
        return ChosenPrompts([one.prompt for one in best], chat, form.name, trial, origin)

    def _draw(self, prompts: Sequence[Any]) -> tuple[list[Any], int]:
        """Draw at most ``count`` of some prompts, and keep their order; then those for samples, and their number."""
        order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(self.inputs.seed)).tolist()
        more = order[self.count : self.count + self.samples]
        more = more if len(more) == self.samples else []  # a few of them say little
        return [prompts[number] for number in (*sorted(order[: self.count]), *more)], len(more)

    def _formats(self) -> tuple[ChatPair, list[str]]:
        """Return the chat templates, and the names of the formats that the adapter may have been trained on."""
        chat = open_chat(self.inputs, self.old, self.new, [])
        usable = chat.old.has_template and chat.new_has_template
        return chat, [*TEMPLATES, *([CHAT] if usable else [])]

    def detect(self, model: Any, records: Sequence[Record]) -> tuple[Format, FormatTrial]:
        """Return the format that the adapter answers most surely; the report has the scores of all."""
        chat, names = self._formats()
        usual = Format(ALPACA)
        trial = FormatTrial.of_records(
            [one for one in records if fits_context(self.old, str(usual.write(one)), self.length)], chat
        )
        if not all(trial.texts.values()):
            return usual, trial
        trial.read(model, self.old)
        name = trial.choose(*self._usual(names))
        return Format.read(name if name in names else ALPACA), trial

    def own_format(self, model: Any) -> tuple[Format, list[Written], FormatTrial]:
        """Find the format by questions that the old model writes without the adapter; also return these.

        With the adapter it writes what depends on the header, which makes one format look better than the others.
        """
        chat, names = self._formats()
        header = UserHeader.of(Format.read(NATURAL), chat.old)
        texts = distinct(self._writer(model).write([(header, "")] * TRIAL, adapted=False))
        records = [Example(one.text) for one in texts]
        fitting = [one for one in records if fits_context(self.old, str(Format(ALPACA).write(one)), self.length)]
        trial = FormatTrial.of_records(fitting, chat, TRIAL)
        if not all(trial.texts.values()):
            return Format(ALPACA), texts, trial
        trial.read(model, self.old)
        name = trial.choose(*self._usual(names, 1.0))
        return Format.read(name if name in names else ALPACA), texts, trial

    def _usual(self, names: Sequence[str], margin: float = CLEAR) -> tuple[str, float]:
        """Return the format that others must beat, and by how much: trainers save a chat template that they used."""
        source = self.inputs.adapter.source
        saved = CHAT in names and source is not None and read_chat_template(source) is not None
        return (CHAT, CLEAR) if saved else (ALPACA, margin)

    def _can_read(self, chosen: ChosenPrompts) -> bool:
        """Return whether the old vocabulary has the words of most prompts."""
        tokenizer = self.old.tokenizer
        rows = tokenizer(chosen.old_texts, add_special_tokens=False)["input_ids"]
        return 2 * sum(tokenizer.unk_token_id in row for row in rows) < len(rows)

    def _target(self, form: Format) -> Target:
        """Return how own prompts are written in a format."""
        chat = open_chat(self.inputs, self.old, self.new, [form.write(Example(NATURAL))])
        headers = [UserHeader.of(form, chat.old)]
        headers += [UserHeader.of(Format.read(NATURAL), chat.old)] if form.name != NATURAL else []

        write = chat.old.write
        return Target(headers, lambda text: form.write(Example(text)), write, lambda one: self._fits(chat, one))

    def _fits(self, chat: ChatPair, prompt: Any) -> bool:
        """Return whether a prompt and its answer fit the contexts of both backbones."""
        sides = (self.old, chat.old), (self.new, chat.new)
        return all(fits_context(backbone, side.write(prompt), self.length) for backbone, side in sides)

    def _writer(self, model: Any) -> Writer:
        chat = open_chat(self.inputs, self.old, self.new, [])
        unknown = self.old.tokenizer.unk_token_id
        stops = {*chat.old.special_ids, *([] if unknown is None else [unknown])}
        return Writer(model, self.old, sorted(stops), self.inputs.seed, self.inputs.progress)


def built_in_records() -> list[Record]:
    """Return the instructions of this package."""
    with as_file(files("peft_lorasuite").joinpath("data/prompts.jsonl")) as path:
        return [read_record(one, "built-in", labeled=False) for _, one in open_stream(path).draw(None, 0)]
