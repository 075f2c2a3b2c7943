"""Distill: train a LoRA on unlabeled prompts, for a few dozen steps, toward the targets of `transplant`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ..adapters.adapter import Adapter
from ..adapters.reading import read_adapter
from ..adapters.writing import write_adapter
from ..io.source import Source
from ..io.temporary import temporary_folder
from ..models.backbone import Backbone
from ..models.classification import padding_of
from ..models.distributed import process_index_and_count
from ..models.restore import fixed_seed
from ..models.task import find_head
from ..training.class_loss import teacher_losses
from .base import DISTILL, FIT, READ_NEW, READ_OLD, MethodInput, MethodResult
from .behavior.classification import (
    TEXTS,
    check_task,
    choose_texts,
    compare_logits,
    logits_at,
    read_split_targets,
    start_classifier,
    zero_update,
)
from .behavior.options import CLASSIFIER_RATE, DistillOptions
from .behavior.probe import probe
from .behavior.samples import sample_answers
from .registry import method
from .transplant import fit_last_layer

SHARED_FACTS = ("hints", "chat", "format", "prompts", "warnings", "found", "samples_held_out")
"""Entries of the report that do not belong to the `transplant` that training starts from."""
MEASURED = 32
"""Answers on which the divergence from the target is measured before and after training."""


@method("distill", options=DistillOptions, needs_backbones=True)
def distill(inputs: MethodInput, options: DistillOptions) -> MethodResult:
    """Train a LoRA toward the adapter's effect on the logits, without labels."""
    _, new = inputs.backbones("the method 'distill'")
    check_task(inputs.adapter.task, "distill", new)
    if inputs.adapter.task.classifies:
        return _distill_classifier(inputs, new, options)
    from ..training.distillation import DistillationTrainer, mean_divergence, target_batch, target_rows

    inputs = inputs.with_stages(READ_OLD, READ_NEW, *([FIT] if options.start else []), DISTILL)
    start = options.transplant()
    probed = probe(inputs, start)
    options = options.resolve(long=probed.long)
    targets = probed.targets(options, seed=inputs.seed).with_anchors(probed.new_head, probed.anchor_states)
    if options.start and probed.place is not None:
        with inputs.stage(FIT):
            first = fit_last_layer(inputs, probed, probed.place, start)
    else:
        first = MethodResult(zero_update(new, inputs), rank=inputs.adapter.rank)
    places = [(turn, position) for turn, _, position in probed.places]
    texts = [(row.ids, row.start) for row in probed.rows]
    rows, answers = target_rows(texts, [*places, *probed.anchors]), target_rows(texts, places)[:MEASURED]
    facts = {
        "prompts": len(probed.turns), "positions": len(places), "anchors": len(probed.anchors),
        "confidence": round(float(targets.confidence[: len(places)].mean()), 4),
        "answers_kept": round(probed.answers_kept(targets), 4),
    }  # fmt: skip
    shared_facts, chat_template, asked = probed.facts, probed.chat_template, probed.asked
    del probed  # it holds the new model's head, and training loads the model again
    tables = {"ids": targets.ids, "log_probs": targets.log_probs}

    def measure(model: Any) -> tuple[dict[str, float], dict[str, Any]]:
        if process_index_and_count()[1] > 1:  # which may have the model in parts
            return {}, {}
        left = mean_divergence(model, answers, **tables, padding=padding_of(new))
        with model.disable_adapter():
            before = mean_divergence(model, answers, **tables, padding=padding_of(new))
        samples = sample_answers(
            model, new, asked, length=options.length, plain=model.disable_adapter(), adapted=nullcontext()
        )
        return {"divergence": round(before, 4), "divergence_left": round(left, 4)}, samples

    trainer = partial(DistillationTrainer, **tables)
    found, losses, (reached, samples) = _train(
        inputs, new, first, rows, options, trainer, target_batch, measure
    )  # fmt: skip
    start_facts = {**shared_facts, **first.facts}
    shared = {name: start_facts.pop(name) for name in SHARED_FACTS if name in start_facts}
    facts = {"distill": {**facts, **reached, **losses, **start_facts}, **shared, **samples}
    return MethodResult(dict(found.updates), facts=facts, rank=first.rank, chat_template=chat_template)


def _distill_classifier(inputs: MethodInput, new: Backbone, options: DistillOptions) -> MethodResult:
    """Train LoRA and head toward the old adapted classifier's logits, without labels.

    A tenth of the texts is not trained on; the report has the agreement with the old adapted classifier on them.
    """
    from ..training.classification import ClassTrainer, class_batch
    from ..training.distillation import target_rows

    task = inputs.adapter.task
    options = replace(options, learning_rate=options.learning_rate or CLASSIFIER_RATE)
    texts = choose_texts(inputs, "distill", options.prompts or TEXTS)
    inputs = inputs.with_stages(READ_OLD, *([FIT] if options.start else []), DISTILL)
    seen, held_out, passes = read_split_targets(inputs, texts, options.epochs)
    first = start_classifier(inputs, seen, fit=options.start)
    trainer = partial(ClassTrainer, targets=seen.logits, losses=teacher_losses, objective=task.objective)
    rows = target_rows([(row.ids, 0) for row in seen.rows], seen.places)
    found, losses, reached = _train(
        inputs, new, first, rows, replace(options, epochs=passes), trainer, class_batch,
        lambda model: logits_at(model, held_out, padding_of(new)),
    )  # fmt: skip
    facts = {"texts": len(texts.new), "positions": len(seen.places), **losses}
    facts |= compare_logits(reached, held_out.logits, task)
    return MethodResult(
        dict(found.updates), facts={"distill": facts, **texts.facts}, rank=first.rank, head=found.head,
        chat_template=texts.chat_template,
    )  # fmt: skip


def _train(
    inputs: MethodInput, new: Backbone, first: MethodResult, rows: Sequence[Any], options: DistillOptions,
    trainer: Callable[..., Any], collate: Callable[..., Any], then: Callable[[Any], Any] = lambda model: None,
) -> tuple[Adapter, dict[str, Any], Any]:  # fmt: skip
    """Train from the updates and the head of ``first``; return the adapter, losses to report, and ``then(model)``."""
    import peft

    from ..training.loop import train
    from ..training.lora_modules import add_modules

    generator, rank = torch.Generator().manual_seed(inputs.seed), first.rank or inputs.adapter.rank
    # a fact edit has a rank of its own
    even = {key: update.padded(rank, generator) for key, update in first.updates.items()}
    task = inputs.adapter.task
    start = Adapter(new.arch, even, inputs.adapter.config, task=task)
    if first.head is not None:
        start = start.with_head(first.head, find_head(new.config, task))
    modules = _trained_modules(inputs, new, options, rank)
    with (
        inputs.stage(DISTILL), temporary_folder() as folder, fixed_seed(inputs.seed),
        new.running(task=task) as plain,
    ):  # fmt: skip
        write_adapter(start, folder, base=new.name)
        model = peft.PeftModel.from_pretrained(plain, str(folder), is_trainable=True)
        add_modules(model, fill=False, **modules)
        trained = train(
            model, rows, padding_of(new), options.training(inputs.seed), inputs.progress, trainer=trainer,
            collate=collate, title=DISTILL,
        )  # fmt: skip
        model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=trained.weights)
        found = read_adapter(Source(str(folder), "adapter"), new.arch)
        reached = then(model.eval())
    losses = {
        "learning_rate": options.training(inputs.seed).learning_rate, "loss": round(trained.loss, 4),
        "losses": [round(one, 4) for one in trained.curve],
    }  # fmt: skip
    return found, losses, reached


def _trained_modules(
    inputs: MethodInput, new: Backbone, options: DistillOptions, rank: int
) -> dict[str, list[str]]:  # fmt: skip
    """Return the modules that get a LoRA, as `add_modules` takes them: by their last names in every layer, or in full.

    Without a converter these are all linear modules of the text model that a LoRA of this rank fits into.
    """
    arch = new.arch
    if not arch.has_converter:
        return {"paths": [site.path for site in arch.sites if site.trained and min(arch.shape(site.path)) >= rank]}
    own = [part for _, part in inputs.adapter.updates] if inputs.adapter.arch.has_converter else arch.parts
    parts = [part for part in dict.fromkeys([*options.parts, *own]) if part in arch.parts]
    return {"modules": [arch.site(part).path.rpartition(".")[2] for part in parts]}
