"""The shift that the new model's last hidden state needs, and the low-rank update that produces it.

In two steps: `solve_shift` solves for the shift of each state by itself, to which least squares (`lowrank`) fits an
update. Least squares weighs every shift by its length, but the head is much more sensitive to some directions than to
others, so `refine` continues from that update towards the target probabilities.
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
from .targets import Head, Targets, chunks

PIECE = 256
"""Positions whose logits over the candidate tokens are held at once."""
PULL = 1e-3
"""Weight, in nats, of the distance from the start for inputs of any direction, relative to the wanted shifts."""
ANCHOR = 1.0
"""The same at the anchors' inputs."""


def solve_shift(head: Head, states: Tensor, targets: Targets, *, ridge: float, steps: int) -> Tensor:
    """Solve for the smallest shift of each state that makes the head give the target probabilities.

    Minimizes ``sum KL(target || head(h + d)) + ridge / (2 mean|h|^2) |d|^2`` over all positions at once by L-BFGS;
    only norm and head are differentiated, never the network.

    Returns:
        The shifts, (positions, D).
    """
    part, h = head.restrict(targets.ids), states.float()
    length = _mean_square(h)
    if not length > 0:
        raise LoraSuiteError("the new backbone's states are all zero or not finite", do="fetch the new backbone again")
    weight = ridge / (2 * length)
    shift = torch.zeros_like(h)
    _minimize([shift], steps, lambda: _Divergence.apply(h + shift, part, targets) + weight * (shift**2).sum())
    if not math.isfinite(float(_Divergence.apply(h + shift, part, targets))):
        raise LoraSuiteError("a backbone's final norm or head gives no finite logits", do="fetch the backbones again")
    return shift


def refine(
    update: LowRank, head: Head, states: Float[Tensor, "positions hidden"], targets: Targets, *,
    x: Float[Tensor, "positions in_"], wanted: Float[Tensor, "positions hidden"], anchors: Float[Tensor, "others in_"],
    factor: Tensor, steps: int,
) -> LowRank:  # fmt: skip
    """Refine an update by L-BFGS towards the target probabilities.

    Minimizes over both factors, with ``dW`` the distance ``B A - B_0 A_0`` from the start,
    ``mean KL(target || head(h + factor * B A x)) + (ANCHOR mean|dW q|^2 + PULL mean|x|^2 |dW|^2) / mean|wanted|^2``.
    The regularization towards the start keeps the update small on other prompts.

    Args:
        update: Where to start.
        head: The new model's head.
        states: ``h``, the last layer's output.
        targets: The target probabilities.
        x: Input of the projection at these positions.
        wanted: The shift wanted of its output there; only its size is used.
        anchors: ``q``, its input at the anchors.
        factor: Scale of its output on the way to the state, broadcast to ``wanted``.
        steps: Steps at most.
    """
    part, h, x, anchors = head.restrict(targets.ids), states.float(), x.float(), anchors.float()
    size, count = _mean_square(wanted), max(len(h), 1)
    if not (size > 0 and steps):
        return update
    pull, calm = PULL * _mean_square(x) / size, ANCHOR / size / max(len(anchors), 1)
    there = update.apply(anchors)
    A, B = (one.contiguous().clone() for one in (update.A, update.B))
    moving = LowRank(A, B)

    def loss() -> Tensor:
        off = _Divergence.apply(h + factor * moving.apply(x), part, targets) / count
        right, left = torch.cat([A, update.A]), torch.cat([B, -update.B], dim=1)
        away = ((left.T @ left) * (right @ right.T)).sum()
        return off + pull * away + calm * (moving.apply(anchors) - there).pow(2).sum()

    _minimize([A, B], steps, loss)
    return moving


def divergence(head: Head, states: Tensor, targets: Targets) -> float:
    """Mean over the positions of ``KL(target || head(states))``, in nats."""
    return max(float(_Divergence.apply(states.float(), head.restrict(targets.ids), targets)), 0.0) / max(len(states), 1)


def _mean_square(rows: Tensor) -> float:
    return float((rows.float() ** 2).sum(dim=-1).mean())


class _Divergence(torch.autograd.Function):
    """Sum of ``KL(target || head(states))`` over the positions, in nats, computed a few positions at a time.

    The logits of all positions would take gigabytes; only the gradient, as large as the states, is kept.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, head: Head, targets: Targets) -> Tensor:
        gradient, total = torch.zeros_like(states), torch.zeros((), dtype=torch.float64)
        for rows in chunks(len(states), PIECE):
            piece = states[rows].detach().requires_grad_()
            with torch.enable_grad():
                got = head.logits(piece).log_softmax(dim=-1)
                off = torch.nn.functional.kl_div(got, targets.log_probs[rows], reduction="sum", log_target=True)
                gradient[rows] = torch.autograd.grad(off, piece)[0] if ctx.needs_input_grad[0] else 0.0
            total += off.detach()
        ctx.save_for_backward(gradient)
        return total.float()

    @staticmethod
    def backward(ctx: Any, *above: Any) -> Any:
        return above[0] * ctx.saved_tensors[0], None, None


def _minimize(values: Sequence[Tensor], steps: int, loss: Callable[[], Tensor]) -> None:
    """Minimize a loss over some tensors, in place, by L-BFGS."""
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
