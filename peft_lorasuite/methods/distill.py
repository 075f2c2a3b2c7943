"""Distill: train a LoRA on unlabeled prompts, for a few dozen steps, toward the targets of `transplant`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..adapters.adapter import Adapter, Key
from ..adapters.reading import read_adapter
from ..adapters.writing import write_adapter
from ..io.source import Source
from ..io.temporary import temporary_folder
from ..linalg.lowrank import LowRank
from ..models.backbone import Backbone
from ..models.restore import fixed_seed
from ..text.vocabulary import pad_token_id
from .base import MethodInput, MethodResult
from .behavior.options import DistillOptions
from .behavior.positions import Tokens
from .behavior.probe import probe
from .behavior.states import RowPosition
from .behavior.targets import Targets
from .registry import method
from .transplant import fit_last_layer

if TYPE_CHECKING:
    from ..training.distillation import TargetRow


@method("distill", options=DistillOptions, needs_backbones=True)
def distill(inputs: MethodInput, options: DistillOptions) -> MethodResult:
    """Train a LoRA toward the adapter's effect on the logits, without labels."""
    _, new = inputs.backbones("the method 'distill'")
    start = options.transplant()
    probed = probe(inputs, start)
    options = options.resolve(long=probed.long)
    targets = probed.targets(options, seed=inputs.seed).with_anchors(probed.new_head, probed.anchor_states)
    first = fit_last_layer(inputs, probed, start) if options.start else _zero_update(new, inputs)
    places = [(turn, position) for turn, _, position in probed.places]
    rows = _target_rows(probed.rows, [*places, *probed.anchors])
    facts = {
        "prompts": len(probed.turns), "positions": len(places), "anchors": len(probed.anchors),
        "entropy_gate": options.entropy_gate, "confidence": round(float(targets.confidence[: len(places)].mean()), 4),
    }  # fmt: skip
    shared_facts, chat_template = probed.facts, probed.chat_template
    del probed  # it holds the new model's head, and training loads the model again
    trained, loss = _train(inputs, new, first, rows, targets, options)
    start_facts = {**shared_facts, **first.facts}
    shared = {name: start_facts.pop(name) for name in ("hints", "chat") if name in start_facts}
    return MethodResult(
        trained, facts={"distill": {**facts, "loss": round(loss, 4), **start_facts}, **shared}, rank=first.rank,
        chat_template=chat_template,
    )  # fmt: skip


def _zero_update(new: Backbone, inputs: MethodInput) -> MethodResult:
    """Return an update that is zero, to start from; A is Kaiming-uniform, so that it can learn."""
    rows, columns = new.arch.shape("down")
    rank = inputs.adapter.rank
    bound = columns**-0.5
    A = torch.empty(rank, columns).uniform_(-bound, bound, generator=torch.Generator().manual_seed(inputs.seed))
    return MethodResult({(new.arch.layers - 1, "down"): LowRank(A, torch.zeros(rows, rank))}, rank=rank)


def _train(
    inputs: MethodInput, new: Backbone, first: MethodResult, rows: Sequence[TargetRow], targets: Targets,
    options: DistillOptions,
) -> tuple[dict[Key, Any], float]:  # fmt: skip
    """Train from the updates of ``first``; return the trained updates and the final loss."""
    import peft

    from ..training.distillation import DistillationTrainer, target_batch
    from ..training.loop import train
    from ..training.lora_modules import add_modules

    generator, rank = torch.Generator().manual_seed(inputs.seed), first.rank or inputs.adapter.rank
    # a fact edit has a rank of its own
    even = {key: update.padded(rank, generator) for key, update in first.updates.items()}
    start = Adapter(new.arch, even, inputs.adapter.config)
    parts = dict.fromkeys([*options.parts, *(part for _, part in inputs.adapter.updates)])
    names = [new.arch.site(part).path.rpartition(".")[2] for part in parts if part in new.arch.parts]
    with temporary_folder() as folder, fixed_seed(inputs.seed), new.running() as plain:
        write_adapter(start, folder, base=new.name)
        model = peft.PeftModel.from_pretrained(plain, str(folder), is_trainable=True)
        add_modules(model, fill=False, modules=names)
        trainer = partial(DistillationTrainer, ids=targets.ids, log_probs=targets.log_probs)
        loss, weights = train(
            model, rows, pad_token_id(new.tokenizer, new.arch.vocabulary), options.training(inputs.seed),
            inputs.progress, trainer=trainer, collate=target_batch,
        )  # fmt: skip
        model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=weights)
        found = read_adapter(Source(str(folder), "adapter"), new.arch)
    return dict(found.updates), loss


def _target_rows(rows: Sequence[Tokens], places: Sequence[RowPosition]) -> list[TargetRow]:
    """Return the rows that have targets, each with their positions and the indices of the targets in ``places``."""
    from ..training.distillation import TargetRow

    by_row: dict[int, list[RowPosition]] = {}
    for index, (row, position) in enumerate(places):
        by_row.setdefault(row, []).append((position, index))
    found = []
    for number, wanted in by_row.items():
        positions, targets = zip(*wanted, strict=True)
        found.append(TargetRow(rows[number].ids, rows[number].start, positions=positions, targets=targets))
    return found
