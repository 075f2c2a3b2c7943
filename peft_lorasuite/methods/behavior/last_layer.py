"""The shift that the new model's last hidden state needs, and the low-rank update that produces it.

`solve_shift` solves for the shift of each state on its own, to which least squares (`lowrank.reduced_rank_ridge`) fits
an update. Least squares weighs shifts by their length, but the head is far more sensitive to some directions than to
others, so `refine` continues from that update toward the target probabilities.
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

CHUNK = 256
"""Positions whose logits over the candidate tokens are computed at once."""
PROXIMAL_WEIGHT = 1e-3
"""Weight, in nats, of the distance from the start at inputs of any direction, relative to the wanted shifts."""
ANCHOR_WEIGHT = 1.0
"""The same at the inputs of the anchors."""


def solve_shift(head: Head, states: Tensor, targets: Targets, *, ridge: float, steps: int) -> Tensor:
    """Solve for the smallest shift of each state that makes the head give the target probabilities.

    Minimizes ``sum KL(target || head(h + d)) + ridge / (2 mean|h|^2) |d|^2`` over all positions at once by L-BFGS,
    through the final norm and the head only.

    Args:
        head: The new model's head.
        states: ``h``, the last layer's output, (positions, D).
        targets: The target probabilities.
        ridge: Weight of the shifts' squared length.
        steps: Steps at most.

    Returns:
        The shifts ``d``, (positions, D).

    Raises:
        LoraSuiteError: When states or logits are not finite.
    """
    part, h = head.restrict(targets.ids), states.to(head.device).float()
    length = _mean_square(h)
    if not length > 0:
        raise LoraSuiteError("the states of the new backbone are all zero or not finite", do="fetch it again")
    weight = ridge / (2 * length)
    shift = torch.zeros_like(h)
    _minimize([shift], steps, lambda: _Divergence.apply(h + shift, part, targets) + weight * (shift**2).sum())
    if not math.isfinite(float(_Divergence.apply(h + shift, part, targets))):
        raise LoraSuiteError("a backbone gives logits that are not finite", do="fetch the backbones again")
    return shift


def refine(
    update: LowRank, head: Head, states: Float[Tensor, "positions hidden"], targets: Targets, *,
    x: Float[Tensor, "positions in_"], wanted: Float[Tensor, "positions hidden"], anchors: Float[Tensor, "others in_"],
    factor: Tensor, steps: int,
) -> LowRank:  # fmt: skip
    """Refine an update by L-BFGS toward the target probabilities.

    With ``dW = B A - B_0 A_0`` the distance from the start, ``a = ANCHOR_WEIGHT`` and ``p = PROXIMAL_WEIGHT``,
    minimizes ``mean KL(target || head(h + factor * B A x)) + (a mean|dW q|^2 + p mean|x|^2 |dW|^2) / mean|wanted|^2``
    over both factors. The regularization toward the start keeps the update small on other prompts.

    Args:
        update: The update to start from, ``B_0 A_0``.
        head: The new model's head.
        states: ``h``, the last layer's output.
        targets: The target probabilities.
        x: Input of the projection at the same positions.
        wanted: The shift wanted of the projection's output; only its mean square is used.
        anchors: ``q``, the projection's input at the anchors.
        factor: Factor from the projection's output to the state, broadcast to ``wanted``.
        steps: Steps at most; 0 returns the update unchanged.
    """
    part, (h, x, anchors) = head.restrict(targets.ids), (one.to(head.device).float() for one in (states, x, anchors))
    size, count = _mean_square(wanted), max(len(h), 1)
    if not (size > 0 and steps):
        return update
    proximal_weight = PROXIMAL_WEIGHT * _mean_square(x) / size
    anchor_weight = ANCHOR_WEIGHT / size / max(len(anchors), 1)
    at_anchors = update.apply(anchors)
    A, B = (one.contiguous().clone() for one in (update.A, update.B))
    refined = LowRank(A, B)

    def loss() -> Tensor:
        mean_divergence = _Divergence.apply(h + factor * refined.apply(x), part, targets) / count
        right, left = torch.cat([A, update.A]), torch.cat([B, -update.B], dim=1)
        distance = ((left.T @ left) * (right @ right.T)).sum()  # |dW|^2
        anchor_distance = (refined.apply(anchors) - at_anchors).pow(2).sum()
        return mean_divergence + proximal_weight * distance + anchor_weight * anchor_distance

    _minimize([A, B], steps, loss)
    return refined


def divergence(head: Head, states: Tensor, targets: Targets) -> float:
    """Return the mean over the positions of ``KL(target || head(states))``, in nats."""
    summed = _Divergence.apply(states.to(head.device).float(), head.restrict(targets.ids), targets)
    return max(float(summed), 0.0) / max(len(states), 1)


def _mean_square(rows: Tensor) -> float:
    return float((rows.float() ** 2).sum(dim=-1).mean())


class _Divergence(torch.autograd.Function):
    """Sum of ``KL(target || head(states))`` over the positions, in nats, computed in chunks.

    The logits of all positions would take gigabytes. The forward pass computes the gradient of each chunk, so that only
    the gradients, (positions, D), are saved.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, head: Head, targets: Targets) -> Tensor:
        gradient, total = torch.zeros_like(states), states.new_zeros((), dtype=torch.float64)
        for rows in chunks(len(states), CHUNK):
            chunk = states[rows].detach().requires_grad_()
            with torch.enable_grad():
                log_probs = head.logits(chunk).log_softmax(dim=-1)
                loss = torch.nn.functional.kl_div(log_probs, targets.log_probs[rows], reduction="sum", log_target=True)
                gradient[rows] = torch.autograd.grad(loss, chunk)[0] if ctx.needs_input_grad[0] else 0.0
            total += loss.detach()
        ctx.save_for_backward(gradient)
        return total.float()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] * ctx.saved_tensors[0], None, None


def _minimize(values: Sequence[Tensor], steps: int, loss: Callable[[], Tensor]) -> None:
    """Minimize a loss over tensors, in place, by L-BFGS."""
    for tensor in values:
        tensor.requires_grad_()
    optimizer = torch.optim.LBFGS(values, max_iter=steps, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return float(value.detach())

    with torch.enable_grad():
        optimizer.step(closure)
    for tensor in values:
        tensor.requires_grad_(False)
        tensor.grad = None
