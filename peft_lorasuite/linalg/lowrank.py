"""A low-rank update as a pair of factors; the product is never formed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import LoraSuiteError

MAX_VALUE = 1e8
"""Of a factor's values, scaling included."""


@dataclass(frozen=True, eq=False)
class LowRank:
    """The update ``dW = B @ A`` of one projection, its scaling folded into the factors.

    Attributes:
        A: ``(r, in)``, float32.
        B: ``(out, r)``, float32.
        bias: ``(out,)`` added to the output (``lora_bias``), or None.
    """

    A: Float[Tensor, "rank in_"]
    B: Float[Tensor, "out rank"]
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        """Number of columns of B."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)`` of the update."""
        return self.B.shape[0], self.A.shape[1]

    def norm(self) -> float:
        """Return ``||B A||_F`` from two r x r Gram matrices."""
        A, B = self.A.double(), self.B.double()
        return float(((B.T @ B) * (A @ A.T)).sum().clamp(min=0).sqrt())

    def delta_weight(self) -> Tensor:
        """Form the product; for tests and for methods that need one dense module at a time."""
        return self.B @ self.A

    def apply(self, x: Float[Tensor, "*rows in_"]) -> Float[Tensor, "*rows out"]:
        """Return what the update adds for some inputs, ``B A x``, in float32 and where they are; without the bias."""
        return x.float() @ self.A.T.to(x.device) @ self.B.T.to(x.device)

    def scaled(self, factor: float) -> LowRank:
        """Return the update times ``factor``."""
        return LowRank(self.A, self.B * factor, None if self.bias is None else self.bias * factor)

    def truncated(self, rank: int) -> tuple[LowRank, float]:
        """Return the best update of at most this rank and the share of the energy ``||dW||_F^2`` that it keeps.

        Directions that add nothing are left out: their factors would be zero on both sides and could not learn.
        """
        U, s, Vt = self._svd()
        total = float((s**2).sum())
        rank = min(rank, int((s > 1e-12 * s.max()).sum()) if total else 0)
        kept = float((s[:rank] ** 2).sum()) / total if total else 1.0
        root = s[:rank].sqrt()
        return LowRank((root[:, None] * Vt[:rank]).float(), (U[:, :rank] * root).float(), self.bias), kept

    def padded(self, rank: int, generator: torch.Generator) -> LowRank:
        """Return the same update with more columns: B's are zero, A's Kaiming-uniform, so that they can learn."""
        extra = rank - self.rank
        if extra <= 0:
            return self
        bound = 1.0 / self.A.shape[1] ** 0.5
        rows = torch.empty(extra, self.A.shape[1]).uniform_(-bound, bound, generator=generator)
        zeros = self.B.new_zeros(self.B.shape[0], extra)
        return LowRank(torch.cat([self.A, rows]), torch.cat([self.B, zeros], dim=1), self.bias)

    def _svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Thin SVD of B A from two thin QRs and one r x r SVD, in float64."""
        Qb, Rb = torch.linalg.qr(self.B.double())
        Qa, Ra = torch.linalg.qr(self.A.double().T)
        U, s, Vt = torch.linalg.svd(Rb @ Ra.T, full_matrices=False)
        return Qb @ U, s, Vt @ Qa.T


def check_values(*factors: Tensor, where: str) -> tuple[Tensor, ...]:
    """Return factors, refusing values that no training gives: their products would leave the range of float32."""
    largest = max((float(factor.abs().max()) for factor in factors if factor.numel()), default=0.0)
    if not largest <= MAX_VALUE:
        raise LoraSuiteError(
            "the adapter's values are out of range", where=where, got=f"{largest:.3g}", wanted=f"at most {MAX_VALUE:.0e}",
            do="train or fetch it again",
        )  # fmt: skip
    return factors


def share_A(updates: Sequence[LowRank]) -> bool:
    """Whether all updates share their A, as the parts of one fused projection do."""
    first = updates[0].A
    return all(update.A is first or torch.equal(update.A, first) for update in updates[1:])


def stack(updates: Mapping[str, LowRank], heights: Mapping[str, int]) -> LowRank:
    """Put the updates of a fused module's parts above one another.

    The rank stays r when all share their A and is the sum of the ranks otherwise. Parts in ``heights`` (part -> rows)
    that have no update get zero rows.
    """
    present = list(updates.values())
    if not present:
        raise LoraSuiteError("there is no update to put together")
    shared = share_A(present)
    rank = present[0].rank if shared else sum(update.rank for update in present)
    A = present[0].A if shared else torch.cat([update.A for update in present])
    B = A.new_zeros(sum(heights.values()), rank)
    bias = A.new_zeros(sum(heights.values())) if any(update.bias is not None for update in present) else None
    row = column = 0
    for part, height in heights.items():
        update = updates.get(part)
        if update is not None:
            B[row : row + height, column : column + update.rank] = update.B
            if bias is not None and update.bias is not None:
                bias[row : row + height] = update.bias
            column += 0 if shared else update.rank
        row += height
    return LowRank(A, B, bias)


def truncated_svd(
    matrix: Float[Tensor, "rows columns"], rank: int, seed: int = 0, *, extra: int = 16, rounds: int = 4
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ``rank`` largest singular triples, U ``(rows, rank)``, s ``(rank,)``, V ``(columns, rank)``.

    Exact where the rank is more than half of the smaller side; otherwise by a random range of ``rank + extra``
    columns, sharpened by ``rounds`` of power iteration, the same for the same seed.
    """
    wide = matrix.shape[0] < matrix.shape[1]
    tall = matrix.T if wide else matrix
    rank = min(rank, tall.shape[1])
    if 2 * rank >= tall.shape[1]:
        U, s, Vt = torch.linalg.svd(tall, full_matrices=False)
    else:
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(tall.shape[1], rank + extra, generator=generator, dtype=tall.dtype)
        Q = torch.linalg.qr(tall @ start).Q
        for _ in range(rounds):
            Q = torch.linalg.qr(tall @ torch.linalg.qr(tall.T @ Q).Q).Q
        U, s, Vt = torch.linalg.svd(Q.T @ tall, full_matrices=False)
        U = Q @ U
    U, s, V = U[:, :rank], s[:rank], Vt[:rank].T
    return (V, s, U) if wide else (U, s, V)


def low_rank_approximation(matrix: Float[Tensor, "out in_"], rank: int) -> tuple[LowRank, float]:
    """Return the best rank-``rank`` update of a dense matrix and the share of its energy that it keeps.

    See `truncated_svd` for how.
    """
    total = float((matrix.double() ** 2).sum())
    U, s, V = truncated_svd(matrix.double() if min(matrix.shape) <= 512 else matrix.float(), rank)
    root = s.sqrt()
    update = LowRank((root[:, None] * V.T).float(), (U * root).float())
    return update, update.norm() ** 2 / total if total else 1.0


def reduced_rank_ridge(
    x: Float[Tensor, "positions in_"], wanted: Float[Tensor, "positions out"], quiet: Float[Tensor, "others in_"], *,
    weight: float, ridge: float, rank: int,
) -> tuple[LowRank, float]:  # fmt: skip
    """Fit ``B A x ≈ wanted`` and ``B A x ≈ 0`` on the quiet rows, optimal among all pairs of this rank.

    Solved in the dual where there are fewer positions than the projection is wide: ``a = (X X^T + λI)^-1 R``, B holds
    the top eigenvectors of ``R^T X X^T a`` and ``A = (X^T a B)^T``; otherwise for ``X^T a = (X^T X + λI)^-1 X^T R``.

    Returns:
        The update, and the share of the wanted shifts' energy that it produces on x.
    """
    scale = torch.cat([torch.full((len(x),), weight**0.5), torch.ones(len(quiet))]).double()[:, None]
    X = torch.cat([x, quiet]).double() * scale
    R = torch.cat([wanted.double(), wanted.new_zeros(len(quiet), wanted.shape[1]).double()]) * scale
    level = float((X**2).sum()) / len(X)
    if not 0 < level < math.inf:
        raise LoraSuiteError("the inputs of a down projection are all zero or not finite: there is nothing to fit on")
    if len(X) <= X.shape[1]:
        dual = _ridge(X @ X.T, ridge * level, R)
        B = _top(R.T @ (R - ridge * level * dual), rank)  # of R^T X X^T a
        A = (dual @ B).T @ X
    else:
        moment = X.T @ R
        primal = _ridge(X.T @ X, ridge * level, moment)
        B = _top(moment.T @ primal, rank)
        A = (primal @ B).T
    off = x.double() @ A.T @ B.T - wanted.double()
    explained = 1 - float((off**2).sum() / (wanted.double() ** 2).sum().clamp(min=1e-300))
    return LowRank(A.float(), B.float()), explained


def _ridge(gram: Tensor, level: float, right: Tensor) -> Tensor:
    """Solve ``(gram + level I) y = right``; the Gram matrix, often the largest thing there is, is overwritten."""
    gram.diagonal().add_(level)
    return torch.cholesky_solve(right, torch.linalg.cholesky(gram))


def _top(matrix: Tensor, rank: int) -> Tensor:
    """Return the eigenvectors of a symmetric matrix's largest eigenvalues as columns."""
    return torch.linalg.eigh((matrix + matrix.T) / 2).eigenvectors[:, -rank:]
