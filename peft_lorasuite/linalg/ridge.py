"""Ridge regression for many penalties from one decomposition, with leave-one-out predictions."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import LoraSuiteError


class RidgePath:
    """Ridge regressions ``targets ≈ x @ weight.T + offset`` for any penalty, solved in float64.

    Args:
        x: Inputs, one row per example.
        targets: Targets, likewise.
        intercept: Whether there is an offset, which is not penalized; without one it is zero.

    Raises:
        LoraSuiteError: If the inputs are all zero or not finite.
    """

    def __init__(
        self, x: Float[Tensor, "examples in_"], targets: Float[Tensor, "examples out"], *, intercept: bool
    ) -> None:
        x, targets = x.double(), targets.double()
        self.mean_x = x.mean(dim=0) if intercept else torch.zeros_like(x[0])
        self.mean_y = targets.mean(dim=0) if intercept else torch.zeros_like(targets[0])
        self.targets, self.leverage = targets, 1 / len(x) if intercept else 0.0
        centered = x - self.mean_x
        level = float((centered**2).sum()) / len(x)
        if not 0 < level < math.inf:
            raise LoraSuiteError("the states of the new backbone are all equal or not finite", do="fetch it again")
        self.level = level
        self.U, self.s, self.Vt = torch.linalg.svd(centered, full_matrices=False)
        self.moment = self.U.T @ (targets - self.mean_y)

    def _shrinkage(self, ridge: float) -> Tensor:
        squares = self.s**2
        return squares / (squares + ridge * self.level)

    def solve(self, ridge: float) -> tuple[Float[Tensor, "out in_"], Float[Tensor, " out"]]:
        """Return weight and offset for a penalty, which is relative to the mean squared length of the inputs."""
        weight = ((self.moment * (self._shrinkage(ridge) / self.s.clamp(min=1e-300))[:, None]).T) @ self.Vt
        return weight, self.mean_y - weight @ self.mean_x

    def left_out(self, ridge: float) -> Float[Tensor, "examples out"]:
        """Return the prediction of each example by the regression on all other examples."""
        shrinkage = self._shrinkage(ridge)
        fitted = self.mean_y + self.U @ (shrinkage[:, None] * self.moment)
        own = (self.U**2 @ shrinkage + self.leverage).clamp(max=1 - 1e-9)
        return self.targets - (self.targets - fitted) / (1 - own)[:, None]
