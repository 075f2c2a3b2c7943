"""Low-rank updates as pairs of factors, and fits and decompositions that return them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import LoraSuiteError, short_message

MAX_VALUE = 1e8
"""Largest absolute value of a factor, with its scaling."""


@dataclass(frozen=True, eq=False)
class LowRank:
    """The update ``delta_weight = B @ A`` of one projection, with the scaling in the factors.

    Attributes:
        A: ``(rank, in)``, float32.
        B: ``(out, rank)``, float32.
        bias: ``(out,)``, added to the output (``lora_bias``), or None.
    """

    A: Float[Tensor, "rank in_"]
    B: Float[Tensor, "out rank"]
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        """Number of rows of A and columns of B."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        return self.B.shape[0], self.A.shape[1]

    def norm(self) -> float:
        """Return the Frobenius norm ``||B A||``, from two Gram matrices of size rank x rank."""
        A, B = self.A.double(), self.B.double()
        return float(((B.T @ B) * (A @ A.T)).sum().clamp(min=0).sqrt())

    def delta_weight(self) -> Tensor:
        """Return the product ``B @ A``, ``(out, in)``; only for code that needs the dense matrix of one module."""
        return self.B @ self.A

    def apply(self, x: Float[Tensor, "*rows in_"]) -> Float[Tensor, "*rows out"]:
        """Return ``B A x``, without the bias, in float32 and on the device of ``x``."""
        return x.float() @ self.A.T.to(x.device) @ self.B.T.to(x.device)

    def cpu(self) -> LowRank:
        """Return the update on the CPU."""
        return LowRank(self.A.cpu(), self.B.cpu(), None if self.bias is None else self.bias.cpu())

    def scaled(self, factor: float) -> LowRank:
        """Return the update times ``factor``."""
        return LowRank(self.A, self.B * factor, None if self.bias is None else self.bias * factor)

    def truncated(self, rank: int) -> tuple[LowRank, float]:
        """Return the best update of at most this rank, and the fraction of the energy ``||B A||^2`` that it keeps.

        Directions with a singular value of zero are left out: both of their factors would be zero, and a later
        training could not change them.
        """
        U, s, Vt = self._svd()
        total = float((s**2).sum())
        rank = min(rank, int((s > 1e-12 * s.max()).sum()) if total else 0)
        kept = float((s[:rank] ** 2).sum()) / total if total else 1.0
        root = s[:rank].sqrt()
        return LowRank((root[:, None] * Vt[:rank]).float(), (U[:, :rank] * root).float(), self.bias), kept

    def padded(self, rank: int, generator: torch.Generator) -> LowRank:
        """Return the same update at a higher rank: new columns of B are zero, new rows of A uniform, as PEFT's init."""
        extra = rank - self.rank
        if extra <= 0:
            return self
        bound = 1.0 / self.A.shape[1] ** 0.5
        rows = torch.empty(extra, self.A.shape[1]).uniform_(-bound, bound, generator=generator)
        zeros = self.B.new_zeros(self.B.shape[0], extra)
        return LowRank(torch.cat([self.A, rows]), torch.cat([self.B, zeros], dim=1), self.bias)

    def _svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the thin SVD of ``B A`` from two thin QRs and an SVD of size rank x rank, in float64."""
        Qb, Rb = torch.linalg.qr(self.B.double())
        Qa, Ra = torch.linalg.qr(self.A.double().T)
        U, s, Vt = torch.linalg.svd(Rb @ Ra.T, full_matrices=False)
        return Qb @ U, s, Vt @ Qa.T


def check_values(*factors: Tensor, where: str, whose: str = "adapter") -> tuple[Tensor, ...]:
    """Return the factors; raise `LoraSuiteError` for values so large that products would overflow float32."""
    sizes = [float(factor.abs().max()) for factor in factors if factor.numel()]
    largest = next((size for size in sizes if not size <= MAX_VALUE), None)  # also NaN, which max() can miss
    if largest is not None:
        raise LoraSuiteError(
            f"the {whose}'s values are out of range", where=where, got=f"{largest:.3g}",
            wanted=f"at most {MAX_VALUE:.0e}", do="train or fetch the inputs again",
        )  # fmt: skip
    return factors


@contextmanager
def decomposition_errors() -> Iterator[None]:
    """Turn the error of a matrix that cannot be decomposed, as its values are too large, into a `LoraSuiteError`."""
    try:
        yield
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
        raise LoraSuiteError(
            "the values of an input are out of range: a matrix cannot be decomposed", got=short_message(error, 80),
            do="train or fetch the inputs again",
        ) from error  # fmt: skip


def share_input_factor(updates: Sequence[LowRank]) -> bool:
    """Whether all updates have the same A, as the parts of a fused projection do."""
    first = updates[0].A
    return all(update.A is first or torch.equal(update.A, first) for update in updates[1:])


def stack(updates: Mapping[str, LowRank], heights: Mapping[str, int]) -> LowRank:
    """Stack the updates of a fused module's parts.

    Args:
        updates: Part -> update.
        heights: Part -> rows, in the order of the result. Parts without an update get rows of zeros.

    Returns:
        An update of the common rank if all updates have the same A, else of the sum of the ranks.
    """
    present = list(updates.values())
    if not present:
        raise LoraSuiteError("there are no updates to stack")
    if len(heights) == 1:
        return present[0]
    shared = share_input_factor(present)
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
    """Return the largest singular values of a matrix with their vectors.

    Computed exactly if the rank is at least half of the smaller dimension, else by a randomized SVD.

    Args:
        matrix: The matrix.
        rank: Number of singular values.
        seed: Seed of the randomized SVD.
        extra: Oversampling columns of the randomized SVD.
        rounds: Power iterations of the randomized SVD.

    Returns:
        U ``(rows, rank)``, s ``(rank,)`` and V ``(columns, rank)``.
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
    """Return the best update of the given rank for a dense matrix, and the fraction of its energy that it keeps."""
    total = float((matrix.double() ** 2).sum())
    U, s, V = truncated_svd(matrix.double() if min(matrix.shape) <= 512 else matrix.float(), rank)
    root = s.sqrt()
    update = LowRank((root[:, None] * V.T).float(), (U * root).float())
    return update, update.norm() ** 2 / total if total else 1.0


def reduced_rank_ridge(
    x: Float[Tensor, "positions in_"], targets: Float[Tensor, "positions out"], anchors: Float[Tensor, "others in_"], *,
    weight: float, ridge: float, rank: int,
) -> tuple[LowRank, float]:  # fmt: skip
    """Fit ``B A x ≈ targets`` and ``B A anchors ≈ 0`` in least squares, optimally for the given rank.

    Solved in the dual if there are fewer positions than input features: ``a = (X X^T + λI)^-1 R``, the columns of B
    are the top eigenvectors of ``R^T X X^T a``, and ``A = (X^T a B)^T``. Otherwise ``X^T a = (X^T X + λI)^-1 X^T R``.

    Args:
        x: Inputs of the projection.
        targets: The outputs that the update should add for ``x``.
        anchors: Inputs for which the update should add nothing.
        weight: Weight of the positions of ``x``; the anchors have weight 1.
        ridge: Ridge penalty λ, relative to the mean squared norm of the weighted inputs.
        rank: Rank of the update.

    Returns:
        The update, and the fraction of the energy of ``targets`` that it explains.

    Raises:
        LoraSuiteError: If the inputs are all zero or not finite.
    """
    scale = torch.cat([x.new_full((len(x),), weight**0.5), x.new_ones(len(anchors))]).double()[:, None]
    X = torch.cat([x, anchors]).double() * scale
    R = torch.cat([targets.double(), targets.new_zeros(len(anchors), targets.shape[1]).double()]) * scale
    level = float((X**2).sum()) / len(X)
    if not 0 < level < math.inf:
        raise LoraSuiteError("the inputs of a down projection are all zero or not finite, so nothing can be fitted")
    if len(X) <= X.shape[1]:
        dual = _ridge(X @ X.T, ridge * level, R)
        B = _top(R.T @ (R - ridge * level * dual), rank)  # of R^T X X^T a
        A = (dual @ B).T @ X
    else:
        moment = X.T @ R
        primal = _ridge(X.T @ X, ridge * level, moment)
        B = _top(moment.T @ primal, rank)
        A = (primal @ B).T
    residual = x.double() @ A.T @ B.T - targets.double()
    explained = 1 - float((residual**2).sum() / (targets.double() ** 2).sum().clamp(min=1e-300))
    return LowRank(A.float(), B.float()), explained


def _ridge(gram: Tensor, level: float, right: Tensor) -> Tensor:
    """Solve ``(gram + level I) y = right``; overwrites ``gram``, often the largest tensor in memory."""
    gram.diagonal().add_(level)
    return torch.cholesky_solve(right, torch.linalg.cholesky(gram))


def _top(matrix: Tensor, rank: int) -> Tensor:
    """Return the eigenvectors of the ``rank`` largest eigenvalues of a symmetric matrix, as columns."""
    return torch.linalg.eigh((matrix + matrix.T) / 2).eigenvectors[:, -rank:]
