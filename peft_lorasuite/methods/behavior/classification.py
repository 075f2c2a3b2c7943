"""What the old adapted classifier puts out for unlabeled texts, and a head of the new backbone fitted to it."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...adapters.adapter import Key
from ...adapters.class_head import ClassHead
from ...adapters.peft_model import load_with_adapter
from ...errors import LoraSuiteError
from ...linalg.lowrank import LowRank
from ...models.backbone import Backbone
from ...models.classification import Row, class_logits, covering_places, encode_for, padding_of
from ...models.memory import free_models
from ...models.task import DECODER, Task, find_head
from ...text.chat import Chat
from ...text.conversations import Conversation
from ...text.examples import MAX_PROMPTS, NAMED, PromptOrText, check_prompt_count, read_prompts
from ...text.prompt_text import PromptText
from ...text.texts import Text
from ...training.class_loss import agreement, teacher_losses
from ..base import FIT, READ_OLD, MethodInput, MethodResult
from .altered_texts import altered
from .class_features import fit_classifier
from .class_states import ClassProblem
from .options import BehaviorOptions
from .prompts import ChosenPrompts, open_chat

MAX_RANK = 64
"""Largest rank of an update that writes features for many labels."""
FEW_TEXTS = 40
"""Texts below which none are held out."""
TEXTS = 2000
"""Texts used at most, unless the option ``prompts`` says otherwise."""
PLACES = 2000
"""Tokens, or texts, that the head is fitted on at most."""


@dataclass(frozen=True, eq=False)
class ClassTargets:
    """Logits of the old adapted classifier for the tokens of the new backbone.

    Attributes:
        rows: The texts in new tokens.
        places: Index of a row and position in it, for each target.
        logits: Target logits, (places, labels).
    """

    rows: Sequence[Row]
    places: Sequence[tuple[int, int]]
    logits: Float[Tensor, "places labels"]


def needs_texts_error(method: str) -> LoraSuiteError:
    """Build the error for a classifier without unlabeled texts."""
    return LoraSuiteError(
        f"the method {method!r} needs unlabeled texts of the task to transfer a classifier", got="none",
        do="pass them (prompts=, --prompts FILE), or use a method that transfers weights (lorasuite)",
    )  # fmt: skip


def check_task(task: Task, method: str, new: Backbone) -> None:
    """Raise `LoraSuiteError` for an embedding model, whose outputs have another size in the new backbone.

    A classifier is fitted to the layers of the new backbone, which only a converter describes.
    """
    if task.classifies and not new.arch.has_converter:
        raise LoraSuiteError(
            "classifiers need a converter for the new backbone", where=repr(new),
            got=f"no converter for {new.arch.family!r}",
            do="choose another new backbone, or add a converter (docs/add-a-family.md)",
        )  # fmt: skip
    if task.kind == "FEATURE_EXTRACTION":
        raise LoraSuiteError(
            f"the method {method!r} does not transfer embedding models", got=f"task_type {task.kind}",
            do="use a method that transfers weights (lorasuite, cross-lora)",
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class ChosenTexts:
    """Texts as each side reads them.

    Attributes:
        old: What the old model reads.
        new: What the new model reads: another text only for conversations, which have a template of their own there.
        facts: Facts for the report.
        chat_template: Chat template to save with the result, if any.
    """

    old: Sequence[Text]
    new: Sequence[Text]
    facts: Mapping[str, Any] = field(default_factory=dict)
    chat_template: str | None = None


def choose_texts(inputs: MethodInput, method: str, count: int) -> ChosenTexts:
    """Draw at most ``count`` of the caller's texts.

    Raises:
        LoraSuiteError: If there are none or too few, or the task reads no pairs or no conversations.
    """
    if inputs.prompts is None or (isinstance(inputs.prompts, str) and inputs.prompts in NAMED):
        raise needs_texts_error(method)
    old, new = inputs.backbones("a classifier")
    read = read_prompts(inputs.prompts, limit=max(count, MAX_PROMPTS), seed=inputs.seed)
    read = check_prompt_count(read, "give more texts")
    check_pairs(inputs.adapter.task, read)
    order = torch.randperm(len(read), generator=torch.Generator().manual_seed(inputs.seed)).tolist()
    drawn = [read[number] for number in sorted(order[:count])]
    if not any(isinstance(prompt, Conversation) for prompt in drawn):
        texts = [_as_text(prompt) for prompt in drawn]
        return ChosenTexts(texts, texts)
    single = [prompt for prompt in drawn if not isinstance(prompt, Text)]
    chosen = ChosenPrompts(single, open_chat(inputs, old, new, single))
    before, after = ([_as_text(prompt, chat) for prompt in drawn] for chat in (chosen.chat.old, chosen.chat.new))
    return ChosenTexts(before, after, chosen.facts(), chosen.chat.saved_template)


def _as_text(prompt: PromptOrText, chat: Chat | None = None) -> Text:
    """Return a prompt as a text; a conversation in whole, with its last turn."""
    if isinstance(prompt, Text):
        return prompt
    if isinstance(prompt, Conversation):
        return Text("" if chat is None else chat.assistant_spans(prompt)[0])
    return Text(prompt + prompt.answer if isinstance(prompt, PromptText) else prompt)


def check_pairs(task: Task, prompts: Sequence[PromptOrText]) -> None:
    """Raise `LoraSuiteError` for pairs that a reward model is to read, and conversations for a token classifier."""
    for number, prompt in enumerate(prompts, 1):
        if task.rewards and isinstance(prompt, Text) and prompt.pair is not None:
            raise LoraSuiteError(
                "a reward model (one output, no problem_type) reads single texts", where=f"text {number}", got="a pair",
                do='pass problem_type="regression" (--problem-type) if it rates pairs',
            )  # fmt: skip
        if task.per_token and isinstance(prompt, Conversation):
            raise LoraSuiteError(
                "token classification reads single texts", where=f"text {number}", got="a conversation"
            )


def read_targets(inputs: MethodInput, texts: ChosenTexts) -> ClassTargets:
    """Run the old adapted classifier on texts, and assign its logits to the tokens of the new backbone.

    A token of the new backbone gets the logits of the old token that has its first character.
    """
    old, new = inputs.backbones("a classifier")
    task = inputs.adapter.task
    sides = ((old, texts.old), (new, texts.new))
    before, after = (encode_for(one, read, per_token=task.per_token) for one, read in sides)
    with inputs.stage(READ_OLD), load_with_adapter(old, inputs.adapter) as model:
        found = class_logits(model, before, padding_of(old), inputs.progress)
    del model
    free_models()
    places, logits = [], []
    for number, (left, right, values) in enumerate(zip(before, after, found, strict=True)):
        pairs = zip(right.places, covering_places(left, right) if task.per_token else [0], strict=True)
        kept = [(position, index) for position, index in pairs if index >= 0]
        places += [(number, position) for position, _ in kept]
        logits.append(values[[index for _, index in kept]])
    if len(places) < 4:
        raise LoraSuiteError(
            "the texts have too few tokens to fit a classifier on", got=len(places), wanted="at least 4",
            do="pass more texts",
        )  # fmt: skip
    return ClassTargets(after, places, torch.cat(logits))


def transplant_classifier(inputs: MethodInput, options: BehaviorOptions) -> MethodResult:
    """Fit a head on the new backbone's states to the old adapted classifier's logits; training-free.

    The result has a LoRA of zeros in the last layer, since PEFT needs a LoRA and further training can use it.
    """
    texts = choose_texts(inputs, "transplant", options.prompts or TEXTS)
    inputs = inputs.with_stages(READ_OLD, FIT)
    fitted = start_classifier(inputs, read_targets(inputs, texts), fit=True)
    facts = {"texts": len(texts.new), **fitted.facts}
    return replace(fitted, facts={"transplant": facts, **texts.facts}, chat_template=texts.chat_template)


def start_classifier(inputs: MethodInput, targets: ClassTargets, *, fit: bool) -> MethodResult:
    """Return a fitted head with an update of one layer, or a head and an update of zeros."""
    _, new = inputs.backbones("a classifier")
    task = inputs.adapter.task
    bias = find_head(new.config, task).bias
    update = zero_update(new, inputs)
    rank = next(iter(update.values())).rank
    if not fit:
        zeros = torch.zeros(len(task.labels), new.arch.hidden)
        return MethodResult(update, rank=rank, head=ClassHead(zeros, zeros[:, 0] if bias else None))
    targets = thin_out(targets, PLACES, inputs.seed)
    rank = max(rank, min(len(task.labels), MAX_RANK))
    with inputs.stage(FIT), new.running(task=DECODER) as model:
        problem = ClassProblem(
            model, new, targets.rows, targets.places, task, bias, rank, padding_of(new), inputs.seed, inputs.progress
        )
        found = fit_classifier(problem, targets.logits)
    del model, problem
    free_models()
    if found.updates:
        update = {(layer, "o"): one for layer, one in found.updates.items()}
    facts = {"positions": len(targets.places), **found.facts, **compare_logits(found.left_out, targets.logits, task)}
    return MethodResult(update, facts=facts, rank=rank, head=found.head)


def read_split_targets(inputs: MethodInput, texts: ChosenTexts, passes: int) -> tuple[ClassTargets, ClassTargets, int]:
    """Read the targets of texts to train on, and those of a tenth that is held out.

    The training texts of all passes but the first are altered ones; conversations stay as their templates are. Both
    parts are all texts where there are few.

    Returns:
        Targets to train on and held-out ones, and how many passes over the first are left.
    """
    count = len(texts.new)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(inputs.seed)).tolist()
    kept_out = set(order[: count // 10]) if count >= FEW_TEXTS else set()
    fitted = [number for number in range(count) if number not in kept_out]
    old, new = ([side[number] for number in (*fitted, *sorted(kept_out))] for side in (texts.old, texts.new))
    more: list[Text] = []
    if texts.old is texts.new:
        seen = old[: len(fitted)]
        more = [one for number in range(1, passes) for one in altered(seen, inputs.seed + number)]
    targets = read_targets(inputs, replace(texts, old=[*old, *more], new=[*new, *more]))
    held_out = range(len(fitted), count) if kept_out else range(count)

    def part(rows: Container[int]) -> ClassTargets:
        kept = [index for index, (row, _) in enumerate(targets.places) if row in rows]
        return ClassTargets(targets.rows, [targets.places[index] for index in kept], targets.logits[kept])

    fitted_rows = {*range(len(fitted)), *range(count, count + len(more))}
    return part(fitted_rows), part(held_out), 1 if more else passes


def logits_at(model: Any, targets: ClassTargets, padding: int) -> Float[Tensor, "places labels"]:
    """Return a classifier's logits at the places of targets."""
    wanted = sorted({row for row, _ in targets.places})
    found = dict(zip(wanted, class_logits(model, [targets.rows[row] for row in wanted], padding), strict=True))
    index = [{position: line for line, position in enumerate(row.places)} for row in targets.rows]
    return torch.stack([found[row][index[row][position]] for row, position in targets.places])


def compare_logits(logits: Tensor, wanted: Tensor, task: Task) -> dict[str, float]:
    """Return the divergence of logits from target logits, that of a constant, and how often they agree."""
    logits, wanted, objective = logits.double(), wanted.double(), task.objective
    constant = wanted.mean(dim=0).expand_as(wanted)
    return {
        "divergence": round(float(teacher_losses(constant, wanted, objective).mean()), 4),
        "divergence_left": round(float(teacher_losses(logits, wanted, objective).mean()), 4),
        "agreement": round(agreement(logits, wanted, objective), 4),
    }


def thin_out(targets: ClassTargets, most: int, seed: int) -> ClassTargets:
    """Return at most ``most`` of the targets, drawn at random."""
    order = torch.randperm(len(targets.places), generator=torch.Generator().manual_seed(seed))
    kept = order[:most].sort().values.tolist()
    return ClassTargets(targets.rows, [targets.places[index] for index in kept], targets.logits[kept])


def zero_update(new: Backbone, inputs: MethodInput) -> dict[Key, LowRank]:
    """Return an update of the last layer that is zero; A is Kaiming-uniform, so that it can learn."""
    key = _last_key(new)
    rows, columns = new.arch.in_layer(key[0]).shape(key[1])
    rank = min(max(inputs.adapter.rank, 1), rows, columns)
    bound = columns**-0.5
    A = torch.empty(rank, columns).uniform_(-bound, bound, generator=torch.Generator().manual_seed(inputs.seed))
    return {key: LowRank(A, torch.zeros(rows, rank))}


def _last_key(new: Backbone) -> Key:
    """Return the key of the last layer's last part or, without a converter, of the last one of the largest modules."""
    arch = new.arch
    if arch.has_converter:
        return arch.layers - 1, arch.last_part or "o"
    trained = [site for site in arch.sites if site.trained] or list(arch.sites)
    most = max(min(arch.shape(site.path)) for site in trained)
    last = [site for site in trained if min(arch.shape(site.path)) == most][-1]
    return last.number, last.path
