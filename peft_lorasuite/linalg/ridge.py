"""Ridge regression: for many penalties from one decomposition with leave-one-out predictions, or for one penalty."""

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
        LoraSuiteError: If the inputs are all equal or not finite.
    """

    def __init__(
        self, x: Float[Tensor, "examples in_"], targets: Float[Tensor, "examples out"], *, intercept: bool
    ) -> None:
        self.x, self.y, self.mean_x, self.mean_y = _centered(x, targets, intercept=intercept)
        self.own = 1 / len(x) if intercept else 0.0
        self.level = _level(self.x)
        if len(x) < x.shape[1]:
            squares, self.U = torch.linalg.eigh(self.x @ self.x.T)
        else:
            squares, V = torch.linalg.eigh(self.x.T @ self.x)
            self.U = self.x @ V / squares.clamp(min=1e-12 * float(squares[-1])).sqrt()
        kept = squares > 1e-12 * squares[-1]
        self.squares, self.U = squares[kept], self.U[:, kept]
        self.moment = self.U.T @ self.y

    def solve(self, ridge: float) -> tuple[Float[Tensor, "out in_"], Float[Tensor, " out"]]:
        """Return weight and offset for a penalty, which is relative to the mean squared length of the inputs."""
        dual = self.U @ (self.moment / (self.squares + ridge * self.level)[:, None])
        weight = dual.T @ self.x
        return weight, self.mean_y - weight @ self.mean_x

    def left_out(self, ridge: float) -> Float[Tensor, "examples out"]:
        """Return the prediction of each example by the regression on all other examples."""
        shrinkage = self.squares / (self.squares + ridge * self.level)
        residual = self.y - self.U @ (shrinkage[:, None] * self.moment)
        own = (self.U**2 @ shrinkage + self.own).clamp(max=1 - 1e-9)
        return self.y + self.mean_y - residual / (1 - own)[:, None]


def solve_ridge(x: Tensor, targets: Tensor, ridge: float, *, intercept: bool) -> tuple[Tensor, Tensor]:
    """Return weight and offset of one ridge regression; the arguments are those of `RidgePath`."""
    if len(x) < x.shape[1]:
        return RidgePath(x, targets, intercept=intercept).solve(ridge)
    x, targets, mean_x, mean_y = _centered(x, targets, intercept=intercept)
    gram = x.T @ x
    gram.diagonal().add_(ridge * _level(x))
    weight = torch.cholesky_solve(x.T @ targets, torch.linalg.cholesky(gram)).T
    return weight, mean_y - weight @ mean_x


def _centered(x: Tensor, y: Tensor, *, intercept: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return inputs and targets in float64 without their means, and the means; those are zero without an intercept."""
    x, y = x.double(), y.double()
    if not intercept:
        return x, y, torch.zeros_like(x[0]), torch.zeros_like(y[0])
    return x - x.mean(dim=0), y - y.mean(dim=0), x.mean(dim=0), y.mean(dim=0)


def _level(x: Tensor) -> float:
    """Return the mean squared length of the rows."""
    level = float((x**2).sum()) / len(x)
    if not 0 < level < math.inf:
        raise LoraSuiteError("the states of the new backbone are all equal or not finite", do="fetch it again")
    return level
