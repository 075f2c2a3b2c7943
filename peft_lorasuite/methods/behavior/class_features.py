"""A classification head that reads more than the final state: what the attention of the upper layers gathers.

The final state of a language model serves to predict the next token, and a head on it misses much of what the model
knows about a text. So a linear map is fitted to the inputs of the ``o`` projections of the upper layers, which gather
from all tokens. A LoRA of each of these projections writes its share of the map's outputs into the residual stream,
all in the same few directions, in which the final states hardly vary and to which the layers hardly respond. The head
reads the sum there. No training is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ...adapters.class_head import ClassHead
from ...arch.spec import OUTPUT_PROJECTIONS
from ...linalg.basis import clamp_gain
from ...linalg.lowrank import LowRank
from ...linalg.ridge import RidgePath, solve_ridge
from ...models.task import MULTI_LABEL, REGRESSION
from ...training.class_loss import teacher_losses
from .class_states import ClassProblem, Features, projection, read_features
from .fact_editing import apply_update

RIDGES = tuple(10.0**power for power in range(-6, 3))
"""Candidate ridges, relative to the mean squared length of the features."""
STRENGTHS = (0.1, 0.3, 1.0)
"""Candidate lengths of what is written, relative to that of the residual state of the first layer: weak components are
lost among what later layers add, and strong ones change what these layers compute."""
TRIAL_PLACES = 256
"""Places on which the length is chosen."""
RESPONSE_ROWS = 256
"""Rows that are sampled of each input projection."""
READOUT_RIDGE = 1e-6
TOKENS_PER_DIMENSION = 3
"""Tokens of the texts, per dimension of the final state, on which the head is fitted to read what is written."""


@dataclass(frozen=True, eq=False)
class ClassFit:
    """A fitted head, with updates if it reads what they write.

    Attributes:
        head: The head.
        updates: Layer -> update of its ``o`` projection.
        left_out: Prediction at every place by a fit to the others, with the error of what is written, (places, labels).
        facts: Facts for the report.
    """

    head: ClassHead
    updates: Mapping[int, LowRank]
    left_out: Tensor
    facts: dict[str, Any]


def fit_classifier(problem: ClassProblem, logits: Float[Tensor, "places labels"]) -> ClassFit:
    """Fit a head, and the updates whose outputs it reads, to target logits; the result is on the CPU."""
    wanted, objective = logits.to(problem.device).double(), problem.task.objective
    if objective not in (REGRESSION, MULTI_LABEL):
        wanted = wanted - wanted.mean(dim=1, keepdim=True)  # a softmax ignores what all logits have in common
    features = read_features(problem, problem.places)
    plain, deep = (_best_fit(x, wanted, objective, problem.bias) for x in (features.final, features.attention))
    alone = ClassFit(_class_head(problem, plain.weight, plain.offset), {}, plain.left_out.cpu(), {"ridge": plain.ridge})
    if deep.loss >= plain.loss:
        return alone
    intended = features.attention.double() @ deep.weight.T + deep.offset
    updates, strength = _choose_writers(problem, deep, features, intended)
    head, reached = _fit_readout(problem, deep, updates)
    missed = float(teacher_losses(reached, intended, objective).mean())
    if missed > plain.loss - deep.loss:
        return alone
    facts = {"ridge": deep.ridge, "layers": len(updates), "strength": strength, "written_error": round(missed, 4)}
    updates = {layer: update.cpu() for layer, update in updates.items()}
    return ClassFit(head, updates, (deep.left_out + reached - intended).cpu(), facts)


def _class_head(problem: ClassProblem, weight: Tensor, offset: Tensor) -> ClassHead:
    return ClassHead(weight.float().cpu(), offset.float().cpu() if problem.bias else None)


class _Fit(NamedTuple):
    """A regression: its leave-one-out loss, ridge, weight, offset and leave-one-out predictions."""

    loss: float
    ridge: float
    weight: Tensor
    offset: Tensor
    left_out: Tensor


def _best_fit(x: Tensor, wanted: Tensor, objective: str, bias: bool) -> _Fit:
    """Fit a regression, with the ridge of the lowest leave-one-out loss."""
    path = RidgePath(x, wanted, intercept=bias)
    losses = {ridge: float(teacher_losses(path.left_out(ridge), wanted, objective).mean()) for ridge in RIDGES}
    best = min(losses, key=lambda ridge: losses[ridge])
    return _Fit(losses[best], best, *path.solve(best), path.left_out(best))


def _choose_writers(
    problem: ClassProblem, deep: _Fit, features: Features, intended: Tensor
) -> tuple[dict[int, LowRank], float]:
    """Return the updates of the strength whose outputs are read best at some of the places, and that strength."""
    directions, updates = _quiet_directions(problem, features.final), {}
    chosen = list(range(0, len(problem.places), max(len(problem.places) // TRIAL_PLACES, 1)))
    trial = replace(problem, places=[problem.places[index] for index in chosen])
    losses = {}
    for strength in STRENGTHS:
        updates[strength] = _writers(problem, deep.weight, features, strength * directions)
        _, reached = _fit_readout(trial, deep, updates[strength])
        losses[strength] = float(teacher_losses(reached, intended[chosen], problem.task.objective).mean())
    best = min(STRENGTHS, key=lambda strength: losses[strength])
    return updates[best], best


def _writers(problem: ClassProblem, weight: Tensor, features: Features, directions: Tensor) -> dict[int, LowRank]:
    """Return the updates of the ``o`` projections that together write ``weight @ attention``.

    Args:
        problem: The problem.
        weight: The map, (labels, inputs of all projections).
        features: States of the model.
        directions: Directions in which the components are written, (hidden, rank), as long as what is written, relative
            to the residual state.
    """
    arch = problem.new.arch
    _, s, Vt = torch.linalg.svd(weight, full_matrices=False)
    widths = [arch.in_layer(layer).shape("o")[1] for layer in problem.layers]
    rank = min(problem.rank, int((s > 1e-6 * s[0]).sum()), arch.hidden, *widths)
    spread = (features.attention.double() @ Vt[:rank].T).std(dim=0).clamp(min=1e-12)
    B = (features.length / (rank**0.5 * arch.residual_scale) * directions[:, :rank]).float()
    pieces = (Vt[:rank] / spread[:, None]).float().split(widths, dim=1)
    updates = {layer: LowRank(A, B) for layer, A in zip(problem.layers, pieces, strict=True)}
    return {layer: update.truncated(rank)[0] for layer, update in updates.items()}  # factors of equal size, to train


def _quiet_directions(problem: ClassProblem, final: Tensor) -> Float[Tensor, "hidden rank"]:
    """Return directions of the residual stream in which final states vary little and to which layers hardly respond.

    Both are quadratic forms, which count the same; the second one is sampled from rows of the input projections.
    """
    new, arch = problem.new, problem.new.arch
    generator = torch.Generator().manual_seed(problem.seed)
    gain = (new.tensor(f"{arch.final_norm}.weight") + arch.gain_offset).to(final.device)
    states = final.double() / clamp_gain(gain).double()
    response = states.new_zeros(arch.hidden, arch.hidden)
    for layer in problem.layers[1:]:
        for part in arch.parts:
            if part not in OUTPUT_PROJECTIONS and arch.has(layer, part):
                weight = new.part(layer, part)
                rows = weight[torch.randperm(len(weight), generator=generator)[:RESPONSE_ROWS]] * new.gain(layer, part)
                rows = rows.to(final.device)
                response += (rows.double().T @ rows.double()) / rows.double().pow(2).sum()
    centered = states - states.mean(dim=0)
    variance = centered.T @ centered
    total = variance / variance.trace() + response / response.trace().clamp(min=1e-30)
    return torch.linalg.eigh(total).eigenvectors[:, : problem.rank]


def _fit_readout(problem: ClassProblem, deep: _Fit, updates: Mapping[int, LowRank]) -> tuple[ClassHead, Tensor]:
    """Fit the head to read what the updates write, at all kinds of tokens; also return its output at the places."""
    count = TOKENS_PER_DIMENSION * problem.new.arch.hidden
    tokens = [*problem.places, *_other_tokens(problem, count)]
    widths = [problem.new.arch.in_layer(layer).shape("o")[1] for layer in problem.layers]
    pieces = deep.weight.float().split(widths, dim=1)
    with ExitStack() as stack:
        for layer, update in updates.items():
            stack.enter_context(apply_update(projection(problem, layer), update))
        after = read_features(problem, tokens, lambda layer, x: x @ pieces[problem.layers.index(layer)].T)
    weight, offset = solve_ridge(after.final, after.attention, READOUT_RIDGE, intercept=problem.bias)
    reached = after.final[: len(problem.places)].double() @ weight.T + offset + deep.offset
    return _class_head(problem, weight, offset + deep.offset), reached


def _other_tokens(problem: ClassProblem, count: int) -> list[tuple[int, int]]:
    """Draw tokens of the same texts beside the places."""
    taken, used = set(problem.places), sorted({row for row, _ in problem.places})
    others = [(row, at) for row in used for at in range(1, len(problem.rows[row].ids)) if (row, at) not in taken]
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(problem.seed))[:count]
    return [others[number] for number in order.tolist()]
