"""Transplant: transfer the adapter's effect on the logits rather than its weights; training-free, without labels.

The old adapted model answers unlabeled prompts. At every position of its answers, the target logits are ``new + old
adapted - old`` where the adapter changed little and, where it changed the prediction, the old adapted model's own (see
`behavior.targets`). First the shift of the new model's last hidden state that gives these logits is solved for. Then
reduced-rank ridge regression fits a low-rank update of the last layer's ``down`` projection that produces the shifts
from its input, and L-BFGS refines it toward the target probabilities (see `behavior.last_layer`). The output of
``down`` is added last, so that only the final norm and the head are between the update and the logits. With per-layer
embeddings, their own output projection comes last, and gets the update.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from ..arch.spec import Architecture
from ..errors import LoraSuiteError
from ..linalg.basis import clamp_gain
from ..linalg.lowrank import reduced_rank_ridge
from .base import FIT, READ_NEW, READ_OLD, MethodInput, MethodResult
from .behavior.classification import check_task, transplant_classifier
from .behavior.last_layer import divergence, refine, solve_shift
from .behavior.options import TransplantOptions
from .behavior.probe import Probe, probe_and
from .behavior.samples import applied, sample_answers
from .behavior.states import LastProjection
from .registry import method


@method("transplant", options=TransplantOptions, needs_backbones=True)
def transplant(inputs: MethodInput, options: TransplantOptions) -> MethodResult:
    """Fit the new model's last layer to the adapter's effect on the logits; training-free."""
    _, new = inputs.backbones("the method 'transplant'")
    check_task(inputs.adapter.task, "transplant", new)
    if inputs.adapter.task.classifies:
        return transplant_classifier(inputs, options)
    if new.arch.has_converter and (last := new.arch.last_part) is not None:
        _check_rank(options, new.arch.in_layer(new.arch.layers - 1).shape(last))
    inputs = inputs.with_stages(READ_OLD, READ_NEW, FIT)

    def fit(model: Any, probed: Probe) -> MethodResult:
        if (place := probed.place) is None:
            raise LoraSuiteError(
                "no linear module's output reaches the final norm of the new model as it is", where=repr(new),
                do="use the method 'distill', which trains modules anywhere",
            )  # fmt: skip
        _check_rank(options, _shape(new.arch, place))
        with inputs.stage(FIT):
            found = fit_last_layer(inputs, probed, place, options)
            samples = sample_answers(
                model, new, probed.asked, length=options.length, plain=nullcontext(),
                adapted=applied(model, new, found.updates, place),
            )  # fmt: skip
        return replace(found, facts={**found.facts, **samples})

    return probe_and(inputs, options, fit)


def _shape(arch: Architecture, place: LastProjection) -> tuple[int, int]:
    layer, part = place.key
    return arch.in_layer(layer).shape(part)


def _check_rank(options: TransplantOptions, shape: tuple[int, int]) -> None:
    most = min(shape)
    if options.rank is not None and options.rank > most:
        raise LoraSuiteError(
            "the rank is above the module's dimensions", where="option rank", got=options.rank, wanted=f"1 to {most}"
        )


def fit_last_layer(
    inputs: MethodInput, probed: Probe, place: LastProjection, options: TransplantOptions
) -> MethodResult:
    """Fit the last projection to the target probabilities.

    Args:
        inputs: Input of the method.
        probed: Answers and states of both models.
        place: The projection.
        options: Options, resolved here by the length of the answers.
    """
    new, head, options = probed.new, probed.new_head, options.resolve(long=probed.long)
    order = torch.randperm(len(probed.places), generator=torch.Generator().manual_seed(inputs.seed))
    used = order[: options.positions].sort().values.tolist()
    x, h, y = (one.to(head.device) for one in probed.last.at(used))
    targets = probed.targets(options, seed=inputs.seed, places=used)
    shift = solve_shift(head, h, targets, ridge=options.shift_ridge, steps=options.steps)
    factor = torch.tensor(place.factor, device=head.device)
    if place.gain is not None:
        factor = factor * clamp_gain(place.gain.to(head.device)) / y.float().pow(2).mean(dim=1, keepdim=True).sqrt()
    wanted, rank = shift / factor, min(max(options.rank or 0, inputs.adapter.rank), *_shape(new.arch, place))
    anchors = probed.anchor_inputs.to(head.device)
    start, _ = reduced_rank_ridge(x, wanted, anchors, weight=options.weight, ridge=options.ridge, rank=rank)
    update = refine(
        start, head, h, targets, x=x, wanted=wanted, anchors=anchors, factor=factor, steps=options.refine_steps or 0
    )
    reached = h.float() + factor * update.apply(x)
    facts = {
        "prompts": len(probed.turns), "positions": len(h),
        "divergence": round(divergence(head, probed.new_states[used], targets), 4),
        "divergence_left": round(divergence(head, reached, targets), 4),
        "confidence": round(float(targets.confidence.mean()), 4),
        "answers_kept": round(probed.answers_kept(targets, used), 4),
    }  # fmt: skip
    if not new.arch.has_converter:
        facts["module"] = place.module
    updates = {**probed.fact_update, place.key: update.cpu()}
    rank = max(one.rank for one in updates.values())
    return MethodResult(
        updates, facts={"transplant": facts, **probed.facts}, rank=rank, chat_template=probed.chat_template
    )
