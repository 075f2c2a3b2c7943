"""Transplant: carry over what the adapter does to the logits, not its weights; training-free, without labels.

The old adapted model answers unlabelled prompts. At every position of its answers the wanted logits are
``new + c (old adapted - old)`` or, where the adapter made the old model sure, its own (see `teacher`). The shift of the
new model's last state that gives them is solved for, and the last layer's ``down`` gets the low-rank update that
produces these shifts from its own input, by reduced-rank ridge regression; a descent goes on from there towards the
probabilities themselves (`fitting`). ``down`` because its output is added last, so that nothing but norm and head
stands between the update and the logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..errors import LoraSuiteError
from ..linalg.basis import floored
from ..linalg.lowrank import reduced_rank_ridge
from .base import Draft, Job, check_bounds, method
from .behavior.last_layer import divergence, sharpened, wanted_shift
from .behavior.probe import Reading, ReadingOptions, read

SHORT: dict[str, Any] = {"gate": 0.5, "rank": 16, "positions": 2000, "sharpen": 60}
"""For formats and choices among answers: the gate keeps the old model's doubts out of them."""
LONG: dict[str, Any] = {"gate": 0.0, "rank": 64, "positions": 10000, "sharpen": 20}
"""For chains of thought: a gate lets nothing through where a chain takes its next turn, and they have more to tell. A
step of the descent takes ten times as long."""


@dataclass(frozen=True)
class TransplantOptions(ReadingOptions):
    """Options of `transplant`, beside those of reading both models.

    ``gate``, ``rank``, ``positions`` and ``sharpen`` that are None become those of `SHORT` or `LONG`, by the length of
    the answers.

    Attributes:
        gate: Entropy in nats at which the old adapted model counts as not knowing; 0 turns the gate off.
        rank: Rank of the update; the adapter's own, if that is larger.
        ridge: Of the regression, as a share of the mean diagonal of the Gram matrix.
        weight: Of a response position against a prompt position, at which no change is wanted.
        positions: Response positions used at most for the last layer's fit, drawn by the seed.
        shift_ridge: Of the solve for the wanted shift.
        steps: Of that solve at most.
        sharpen: Steps at most of the descent from the regression's update towards the wanted probabilities; 0 for none.
    """

    gate: float | None = None
    rank: int | None = None
    ridge: float = 0.1
    weight: float = 8.0
    positions: int | None = None
    shift_ridge: float = 0.01
    steps: int = 25
    sharpen: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"gate": 0, "rank": 1, "ridge": 1e-9, "weight": 1e-9, "positions": 4, "shift_ridge": 0, "steps": 1}
        check_bounds(self, least | {"sharpen": 0})


@method("transplant", options=TransplantOptions, needs_backbones=True)
def transplant(job: Job, options: TransplantOptions) -> Draft:
    """Fit the new model's last layer to what the adapter did to the old model's logits on unlabelled prompts."""
    _, new = job.backbones("transplant")
    most = min(new.arch.shape("down"))
    if options.rank is not None and options.rank > most:
        raise LoraSuiteError(
            "the rank is above the module's dimensions", where="option rank", got=options.rank, wanted=f"1 to {most}"
        )
    return fit(job, read(job, options), options)


def fit(job: Job, reading: Reading, options: TransplantOptions) -> Draft:
    """Fit the last layer's down projection to the teacher's probabilities."""
    new, head = reading.new, reading.new_head
    layer, site = new.arch.layers - 1, new.arch.site("down")
    gate, rank, positions, sharpen = _settled(options, reading)
    order = torch.randperm(len(reading.places), generator=torch.Generator().manual_seed(job.seed))
    used = order[:positions].sort().values.tolist()
    x, h, y = reading.last.at(used)
    teacher = reading.teacher(options, gate=gate, seed=job.seed, places=used)
    shift = wanted_shift(head, h, teacher, ridge=options.shift_ridge, steps=options.steps)
    factor = torch.tensor(new.arch.residual_scale)
    if site.post_norm is not None:
        factor = factor * floored(new.gain(layer, "down")) / y.float().pow(2).mean(dim=1, keepdim=True).sqrt()
    wanted, rank = shift / factor, min(max(rank, job.adapter.rank), *new.arch.shape("down"))
    start, _ = reduced_rank_ridge(x, wanted, reading.quiet, weight=options.weight, ridge=options.ridge, rank=rank)
    update = sharpened(start, head, h, teacher, x=x, wanted=wanted, quiet=reading.quiet, factor=factor, steps=sharpen)
    reached = h.float() + factor * update.applied(x)
    facts = {
        "prompts": len(reading.turns), "positions": len(h), "gate": gate,
        "divergence": round(divergence(head, reading.before[used], teacher), 4),
        "divergence_left": round(divergence(head, reached, teacher), 4),
        "confidence": round(float(teacher.confidence.mean()), 4),
    }  # fmt: skip
    updates = {**reading.memory, (layer, "down"): update}
    rank = max(one.rank for one in updates.values())
    return Draft(updates, facts={"transplant": facts, **reading.facts}, rank=rank)


def _settled(options: TransplantOptions, reading: Reading) -> tuple[float, int, int, int]:
    """Gate, rank, positions and steps of the descent: as given, or what answers of this length want."""
    chosen = LONG if reading.long else SHORT
    given = {name: getattr(options, name) for name in chosen}
    gate, rank, positions, sharpen = (chosen[name] if value is None else value for name, value in given.items())
    return gate, rank, positions, sharpen
