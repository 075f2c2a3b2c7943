"""What the new model's last state lacks, and the low-rank update that is to bring it.

In two steps. `wanted_shift` solves for the shift of each state by itself, to which least squares (`lowrank`) fits an
update: a start that no step of a descent reaches as fast. But least squares counts every shift by its length, and the
head feels some directions much more than others, so `sharpened` goes on from there, towards the probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import LoraSuiteError
from ...linalg.lowrank import LowRank
from .targets import Head, Teacher, chunks

PIECE = 256
"""Positions whose logits over the candidate tokens are held at once."""
PULL = 1e-3
"""Weight, in nats, of leaving the start, for inputs of any direction; against the wanted shifts."""
CALM = 1.0
"""The same at the inputs at which nothing is wanted."""


def wanted_shift(head: Head, states: Tensor, teacher: Teacher, *, ridge: float, steps: int) -> Tensor:
    """Solve for the smallest shift of each state that makes the head give the teacher's probabilities.

    Minimises ``sum KL(teacher || head(h + d)) + ridge / (2 mean|h|^2) |d|^2`` over all positions at once by L-BFGS;
    only norm and head are differentiated, never the network.

    Returns:
        The shifts, (positions, D).
    """
    part, h = head.on(teacher.ids), states.float()
    length = _mean_square(h)
    if not length > 0:
        raise LoraSuiteError("the new backbone's states are all zero or not finite", do="fetch the new backbone again")
    weight = ridge / (2 * length)
    shift = torch.zeros_like(h)
    _minimise([shift], steps, lambda: _Divergence.apply(h + shift, part, teacher) + weight * (shift**2).sum())
    if not math.isfinite(float(_Divergence.apply(h + shift, part, teacher))):
        raise LoraSuiteError("a backbone's final norm or head gives no finite logits", do="fetch the backbones again")
    return shift


def sharpened(
    update: LowRank, head: Head, states: Float[Tensor, "positions hidden"], teacher: Teacher, *,
    x: Float[Tensor, "positions in_"], wanted: Float[Tensor, "positions hidden"], quiet: Float[Tensor, "others in_"],
    factor: Tensor, steps: int,
) -> LowRank:  # fmt: skip
    """Descend from an update towards the one whose states give the teacher's probabilities.

    Minimises, by L-BFGS on both factors, with ``dW`` the distance ``B A - B_0 A_0`` from the start,
    ``mean KL(teacher || head(h + factor * B A x)) + (CALM mean|dW q|^2 + PULL mean|x|^2 |dW|^2) / mean|wanted|^2``.
    What the start gets right already stays as it is: a smaller update that does as well on the prompts does less on
    others.

    Args:
        update: Where to start.
        head: The new model's head.
        states: ``h``, the last layer's output.
        teacher: The wanted probabilities.
        x: Input of the projection at these positions.
        wanted: What it would have to add to its output there; alone the size counts.
        quiet: ``q``, its input where nothing is wanted.
        factor: What becomes of its output on the way to the state; broadcast to ``wanted``.
        steps: Of the descent at most.
    """
    part, h, x, quiet = head.on(teacher.ids), states.float(), x.float(), quiet.float()
    size, count = _mean_square(wanted), max(len(h), 1)
    if not (size > 0 and steps):
        return update
    pull, calm = PULL * _mean_square(x) / size, CALM / size / max(len(quiet), 1)
    there = update.applied(quiet)
    A, B = (one.contiguous().clone() for one in (update.A, update.B))
    moving = LowRank(A, B)

    def loss() -> Tensor:
        off = _Divergence.apply(h + factor * moving.applied(x), part, teacher) / count
        right, left = torch.cat([A, update.A]), torch.cat([B, -update.B], dim=1)
        away = ((left.T @ left) * (right @ right.T)).sum()
        return off + pull * away + calm * (moving.applied(quiet) - there).pow(2).sum()

    _minimise([A, B], steps, loss)
    return moving


def divergence(head: Head, states: Tensor, teacher: Teacher) -> float:
    """Mean over the positions of ``KL(teacher || head(states))``, in nats."""
    return max(float(_Divergence.apply(states.float(), head.on(teacher.ids), teacher)), 0.0) / max(len(states), 1)


def _mean_square(rows: Tensor) -> float:
    return float((rows.float() ** 2).sum(dim=-1).mean())


class _Divergence(torch.autograd.Function):
    """Sum of ``KL(teacher || head(states))`` over the positions, in nats; the logits of a few of them at a time.

    Those of all would take gigabytes, and longer: the slope is as large as the states, and all that is kept.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, head: Head, teacher: Teacher) -> Tensor:
        slope, total = torch.zeros_like(states), torch.zeros((), dtype=torch.float64)
        for rows in chunks(len(states), PIECE):
            piece = states[rows].detach().requires_grad_()
            with torch.enable_grad():
                got = head.logits(piece).log_softmax(dim=-1)
                off = torch.nn.functional.kl_div(got, teacher.target[rows], reduction="sum", log_target=True)
                slope[rows] = torch.autograd.grad(off, piece)[0] if ctx.needs_input_grad[0] else 0.0
            total += off.detach()
        ctx.save_for_backward(slope)
        return total.float()

    @staticmethod
    def backward(ctx: Any, *above: Any) -> Any:
        return above[0] * ctx.saved_tensors[0], None, None


def _minimise(values: Sequence[Tensor], steps: int, loss: Callable[[], Tensor]) -> None:
    """Change values, in place, to where a loss is least."""
    for one in values:
        one.requires_grad_()
    solver = torch.optim.LBFGS(values, max_iter=steps, history_size=10, line_search_fn="strong_wolfe")

    def step() -> float:
        solver.zero_grad()
        found = loss()
        found.backward()
        return float(found.detach())

    with torch.enable_grad():
        solver.step(step)
    for one in values:
        one.requires_grad_(False)
        one.grad = None
