"""Distil: train the upgraded adapter on unlabelled prompts, a few dozen steps, towards what `transplant` wants."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..adapters import adapter as adapter_files
from ..arch.spec import check_parts
from ..io.source import Source
from ..models.backbone import Backbone
from ..models.restore import seeded
from .base import Draft, Job, check_bounds, method
from .behavior.positions import Tokens
from .behavior.probe import LEAST, MOST, ReadingOptions, read
from .behavior.states import At
from .behavior.targets import Teacher
from .transplant import TransplantOptions, fit

if TYPE_CHECKING:
    from ..training.loop import FinetuneOptions, Taught

GATE = 1.0
"""Nats at which the old adapted model counts as not knowing a short answer's next token."""


@dataclass(frozen=True)
class DistillOptions:
    """Options of `distill`.

    Attributes:
        prompts: Prompts used at most, drawn by the seed.
        length: Tokens of a response at most.
        gate: As in `transplant`; by default 1 nat for short answers, and none for long ones.
        epochs: Passes over the prompts.
        batch_size: Prompts of one step.
        micro_batch_size: Prompts read at once, a divisor of ``batch_size``: less memory, the same steps. By default a
            whole batch.
        learning_rate: Peak learning rate; it falls linearly.
        top: As in `transplant`.
        extra: Further candidate tokens.
        trust: As in `transplant`.
        share: As in `transplant`.
        quiet: Prompt positions used, at which the new model is held to what it says by itself.
        text: Tokens of the built-in text used, about, at which it is held likewise.
        start: Start from `transplant` (True) or from the new backbone as it is.
        recombine: As in `transplant`.
        parts: Parts that are trained beside the adapter's own.
    """

    prompts: int = 128
    length: int = 48
    gate: float | None = None
    epochs: int = 3
    batch_size: int = 8
    micro_batch_size: int | None = None
    learning_rate: float = 1e-3
    top: int | None = None
    extra: int = 1000
    trust: float = 0.5
    share: float | None = None
    quiet: int = 1000
    text: int = 3000
    start: bool = True
    recombine: int = 0
    parts: tuple[str, ...] = field(default=("q", "k", "v", "o"))

    def __post_init__(self) -> None:
        least = {"gate": 0, "epochs": 1, "batch_size": 1, "micro_batch_size": 1, "learning_rate": 1e-9}
        check_bounds(self, LEAST | least, MOST | {"learning_rate": 1})
        check_parts(self.parts)
        self.training(seed=0)

    def training(self, seed: int) -> FinetuneOptions:
        """Return the settings of the training, and refuse bad ones before anything is read."""
        from ..training.loop import FinetuneOptions

        return FinetuneOptions(
            epochs=self.epochs, batch_size=self.batch_size, micro_batch_size=self.micro_batch_size,
            learning_rate=self.learning_rate, seed=seed,
        )  # fmt: skip


@method("distill", options=DistillOptions, needs_backbones=True)
def distill(job: Job, options: DistillOptions) -> Draft:
    """Train, without labels, towards the logits that `teach` derives from what the adapter did to the old model."""
    _, new = job.backbones("distill")
    shared = {one.name: getattr(options, one.name) for one in fields(ReadingOptions) if hasattr(options, one.name)}
    start = TransplantOptions(**shared, rank=16, sharpen=0)  # a larger rank would be trained in every part
    reading = read(job, start)
    usual = 0.0 if reading.long else GATE
    gate = usual if options.gate is None else options.gate
    teacher = reading.teacher(start, gate=gate, seed=job.seed).holding(reading.new_head, reading.still_before)
    first = fit(job, reading, start) if options.start else _nothing(new, job)
    rows = _rows(reading.rows, [*((turn, position) for turn, _, position in reading.places), *reading.still])
    facts = {
        "prompts": len(reading.turns), "positions": len(reading.places), "held": len(reading.still), "gate": gate,
        "confidence": round(float(teacher.confidence[: len(reading.places)].mean()), 4),
    }  # fmt: skip
    del reading  # it holds the new model's head, and training loads the model anew
    trained, loss = _train(job, new, first, rows, teacher, options)
    told = dict(first.facts)
    hints = {"hints": told.pop("hints")} if "hints" in told else {}
    facts |= {"loss": round(loss, 4), **told}
    return Draft(trained, facts={"distill": facts, **hints}, rank=first.rank)


def _nothing(new: Backbone, job: Job) -> Draft:
    """Return an update of zero to start from."""
    from ..linalg.lowrank import LowRank

    rows, columns = new.arch.shape("down")
    rank = job.adapter.rank
    bound = columns**-0.5
    A = torch.empty(rank, columns).uniform_(-bound, bound, generator=torch.Generator().manual_seed(job.seed))
    return Draft({(new.arch.layers - 1, "down"): LowRank(A, torch.zeros(rows, rank))}, rank=rank)


def _train(
    job: Job, new: Backbone, first: Draft, rows: Sequence[Taught], teacher: Teacher, options: DistillOptions
) -> tuple[dict[adapter_files.Key, Any], float]:  # fmt: skip
    import peft

    from ..training.encoding import padding
    from ..training.finetune import add_modules
    from ..training.loop import train

    generator, rank = torch.Generator().manual_seed(job.seed), first.rank or job.adapter.rank
    # what was memorised has a rank of its own
    even = {key: update.padded(rank, generator) for key, update in first.updates.items()}
    start = adapter_files.Adapter(new.arch, even, job.adapter.config)
    parts = dict.fromkeys([*options.parts, *(part for _, part in job.adapter.updates)])
    names = [new.arch.site(part).path.rpartition(".")[2] for part in parts if part in new.arch.parts]
    with tempfile.TemporaryDirectory() as name, seeded(job.seed), new.running() as plain:
        folder = Path(name)
        adapter_files.write(start, folder, base=new.name)
        model = peft.PeftModel.from_pretrained(plain, name, is_trainable=True)
        add_modules(model, fill=False, modules=names)
        loss, weights = train(model, rows, padding(new.tokenizer), options.training(job.seed), job.progress, teacher)
        model.save_pretrained(name, save_embedding_layers=False, state_dict=weights)
        found = adapter_files.read(Source(name, "adapter"), new.arch)
    return dict(found.updates), loss


def _rows(rows: Sequence[Tokens], places: Sequence[At]) -> list[Taught]:
    """Return every row with the positions that the teacher speaks of; its own rows are numbered as the places."""
    from ..training.loop import Taught

    found: dict[int, list[At]] = {}
    for index, (row, position) in enumerate(places):
        found.setdefault(row, []).append((position, index))
    return [
        Taught(rows[number].ids, rows[number].start, *zip(*taught, strict=True)) for number, taught in found.items()
    ]
