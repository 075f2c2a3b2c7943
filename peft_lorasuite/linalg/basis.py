"""Changes of basis between two backbones: hidden states, attention heads, feed-forward units. Solved in float64."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from ..arch.spec import OUTPUT_PROJECTIONS, Architecture
from ..errors import LoraSuiteError, unknown_name_error

HIDDEN_MAPS = ("embeddings", "polar", "identity")
EXACT = 1e-3
"""Fits with a relative residual up to this are exact; updates through them are not rescaled."""
FLAT = 1e-5
"""Directions of a map below this fraction of the largest one are rounding errors."""
GAIN_FLOOR = 1e-3
"""Smallest gain that is divided by, as a fraction of the median."""


def hidden_map(old: Float[Tensor, "tokens old"], new: Float[Tensor, "tokens new"], kind: str = "embeddings") -> Tensor:
    """Return the map ``W_h (D_o, D_n)`` between hidden states, ``h_n ≈ W_h^T h_o`` (LoRASuite section 3.1).

    Args:
        old: Embeddings of the shared tokens in the old backbone, times its embedding multiplier.
        new: Embeddings of the same tokens in the new backbone.
        kind: ``"embeddings"`` for the least-squares map; ``"polar"`` for the semi-orthogonal map nearest to it, which
            is more robust to noise; ``"identity"`` for backbones of equal hidden size where the new one continues the
            pre-training of the old one (the paper's choice there).

    Raises:
        LoraSuiteError: For an unknown kind, the identity with unequal hidden sizes, or shared tokens that do not span
            the old hidden space.
    """
    if kind not in HIDDEN_MAPS:
        raise unknown_name_error("hidden map", kind, HIDDEN_MAPS)
    size = old.shape[1]
    if kind == "identity":
        if size != new.shape[1]:
            got = f"{size} and {new.shape[1]}"
            raise LoraSuiteError("the identity needs equal hidden sizes", got=got, do='use hidden_map="embeddings"')
        return torch.eye(size)
    gram, cross = _normal_equations(old, new)
    values, vectors = torch.linalg.eigh(gram)
    if len(old) < size or float(values[0]) <= 1e-12 * float(values[-1]):
        raise LoraSuiteError(
            "the shared tokens do not span the old hidden space",
            got=f"rank {int((values > 1e-12 * values[-1]).sum())} from {len(old)} shared tokens",
            wanted=f"rank {size}",
            do='use hidden_map="identity" if the new backbone continues the old one, or another pair of backbones',
        )
    W = vectors @ ((vectors.T @ cross) / values[:, None])
    if kind == "polar":
        U, _, Vt = torch.linalg.svd(W, full_matrices=False)
        W = U @ Vt
        W *= float(new.norm()) / float((W.T @ gram @ W).trace().sqrt())
    return W.float()


def _normal_equations(old: Tensor, new: Tensor, chunk: int = 8192) -> tuple[Tensor, Tensor]:
    """Return ``old^T old`` and ``old^T new`` in float64, without a float64 copy of all rows."""
    gram = torch.zeros(old.shape[1], old.shape[1], dtype=torch.float64)
    cross = torch.zeros(old.shape[1], new.shape[1], dtype=torch.float64)
    for start in range(0, len(old), chunk):
        left, right = old[start : start + chunk].double(), new[start : start + chunk].double()
        gram += left.T @ left
        cross += left.T @ right
    return gram, cross


def pseudo_inverse(W: Float[Tensor, "old new"]) -> Float[Tensor, "new old"]:
    """Return ``pinv(W)``: by a Cholesky factorization of the smaller Gram matrix if W has full rank, else by SVD.

    Directions below `FLAT` times the largest one are rounding errors of float32 and are not inverted.
    """
    W = W.double()
    wide = W.shape[0] <= W.shape[1]
    gram = W @ W.T if wide else W.T @ W
    factor, failed = torch.linalg.cholesky_ex(gram)
    pivots = factor.diagonal()
    if int(failed) or float(pivots.min()) < FLAT * float(pivots.max()):
        return torch.linalg.pinv(W, rtol=FLAT).float()
    solution = torch.cholesky_solve(W if wide else W.T, factor)
    return (solution.T if wide else solution).float()


@dataclass(frozen=True, eq=False)
class Basis:
    """The change of basis of one part of one matched layer, stored in factors.

    Attributes:
        hidden: ``W_h (D_o, D_n)``.
        inverse: ``pinv(W_h) (D_n, D_o)``.
        old_gain: Gain ``(D_o,)`` of the old norm before an input projection or after an output projection.
        new_gain: The same in the new backbone, ``(D_n,)``.
        normed: Whether both backbones have a norm before the part.
        residual: Old residual multiplier of output projections divided by the new one.
    """

    hidden: Tensor
    inverse: Tensor
    old_gain: Tensor
    new_gain: Tensor
    normed: bool = True
    residual: float = 1.0

    def map_inputs(self, rows: Float[Tensor, "rows old"]) -> Float[Tensor, "rows new"]:
        """Return ``rows @ R_in``: rows of an input projection, converted to take new hidden states."""
        # twice as fast for a few rows as with the factors transposed
        return (self.inverse @ (rows * self.old_gain).T).T * self._input_scale

    def map_outputs(self, columns: Float[Tensor, "old columns"]) -> Float[Tensor, "new columns"]:
        """Return ``R_out @ columns``: columns of an output projection, converted to produce new hidden states."""
        return ((columns * self.old_gain[:, None]).T @ self.hidden).T * self._output_scale[:, None]

    def input_matrix(self) -> Float[Tensor, "old new"]:
        """Return ``R_in = κ diag(g_o) pinv(W_h)^T diag(1/g_n)``; ``κ = ||W_h||_F / sqrt(D_n)`` after a norm, else 1."""
        return self.old_gain[:, None] * self.inverse.T * self._input_scale

    def output_matrix(self) -> Float[Tensor, "old new"]:
        """Return ``R_out^T``, where ``R_out = residual diag(1/g_n) W_h^T diag(g_o)``."""
        return self.old_gain[:, None] * self.hidden * self._output_scale

    @cached_property
    def _input_scale(self) -> Tensor:
        scale = float(self.hidden.norm()) / self.hidden.shape[1] ** 0.5 if self.normed else 1.0
        return scale / clamp_gain(self.new_gain)

    @cached_property
    def _output_scale(self) -> Tensor:
        return self.residual / clamp_gain(self.new_gain)


def part_basis(
    old: Architecture, new: Architecture, part: str, hidden: Tensor, inverse: Tensor, gains: tuple[Tensor, Tensor]
) -> Basis:
    """Return the change of basis of one part, given the gains (old, new) of the norms next to it."""
    if part in OUTPUT_PROJECTIONS:
        return Basis(hidden, inverse, *gains, normed=False, residual=old.residual_scale / new.residual_scale)
    normed = old.site(part).norm is not None and new.site(part).norm is not None
    return Basis(hidden, inverse, *gains, normed=normed)


def clamp_gain(gain: Tensor) -> Tensor:
    """Replace gains near zero by plus or minus `GAIN_FLOOR` times the median, so that they can be divided by."""
    floor = GAIN_FLOOR * gain.abs().median().clamp(min=1e-30)
    return torch.where(gain.abs() < floor, torch.where(gain < 0, -floor, floor), gain)


@dataclass(frozen=True, eq=False)
class HeadFit:
    """Maps between the matched attention heads of a part.

    Attributes:
        T: ``(pairs, d_o, d_n)``.
        residual: Relative residual of each fit, ``(pairs,)``.
        norms: ``||W_o||_F`` and ``||W_n||_F`` of each pair, ``(pairs, 2)``.
    """

    T: Tensor
    residual: Tensor
    norms: Tensor


def fit_heads(
    moved: Float[Tensor, "pairs size_o new"],
    target: Float[Tensor, "pairs size_n new"],
    old_norms: Float[Tensor, " pairs"],
    rotary: Rotary | None = None,
) -> HeadFit:
    """Fit ``T`` in ``T^T M ≈ N`` for every pair of heads by least squares.

    Args:
        moved: Weights M of the old heads in the new hidden basis.
        target: Weights N of the new heads.
        old_norms: Frobenius norms of the old heads' weights in the old basis.
        rotary: Given for q and k with rotary position embeddings. Fits that are not exact are then restricted to one
            rotation and scale per rotary pair, the only maps that commute with the rotations.
    """
    gram, cross, size = _products(moved, target)
    T = _solve_each(gram, cross)
    residual = _relative_residual(T, gram, cross, size)
    if rotary is not None and bool((residual > EXACT).any()):
        T = torch.where((residual > EXACT)[:, None, None], rotary.fit(gram, cross), T)
        residual = _relative_residual(T, gram, cross, size)
    return HeadFit(T.float(), residual.float(), torch.stack([old_norms, size], dim=1).float())


def _products(moved: Tensor, target: Tensor, chunk: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``M M^T``, ``M N^T`` and ``||N||`` of every pair in float64, in chunks to keep the copies small."""
    found = []
    for left, right in zip(moved.split(chunk), target.split(chunk), strict=True):
        M, N = left.double(), right.double()
        found.append((M @ M.mT, M @ N.mT, N.flatten(1).norm(dim=1)))
    gram, cross, size = map(torch.cat, zip(*found, strict=True))
    return gram, cross, size


def _solve_each(gram: Tensor, cross: Tensor) -> Tensor:
    """Return ``pinv(gram) @ cross`` of every pair, by a Cholesky factorization where the head has full rank."""
    factor, failed = torch.linalg.cholesky_ex(gram)
    pivots = factor.diagonal(dim1=1, dim2=2)
    singular = (failed > 0) | (pivots.amin(dim=1) <= FLAT * pivots.amax(dim=1))
    T = torch.cholesky_solve(cross, factor)
    if bool(singular.any()):
        T[singular] = torch.linalg.pinv(gram[singular], hermitian=True, rtol=1e-12) @ cross[singular]
    return T


def _relative_residual(T: Tensor, gram: Tensor, cross: Tensor, size: Tensor) -> Tensor:
    """Return ``||T^T M - N|| / ||N||`` from ``M M^T``, ``M N^T`` and ``||N||``, accurate to 1e-8 in float64."""
    square = ((gram @ T - 2 * cross) * T).sum(dim=(1, 2)) + size**2
    return torch.where(size > 0, square.clamp(min=0).sqrt() / size.clamp(min=1e-300), 0.0)


@dataclass(frozen=True)
class Rotary:
    """Rotary position embeddings of an old and a new layer.

    Attributes:
        old_size, new_size: Number of rotated dimensions of a head; they come first.
        old_theta, new_theta: Base of the frequencies.
    """

    old_size: int
    new_size: int
    old_theta: float
    new_theta: float

    def fit(
        self, gram: Float[Tensor, "pairs size_o size_o"], cross: Float[Tensor, "pairs size_o size_n"]
    ) -> Float[Tensor, "pairs size_o size_n"]:
        """Fit one complex factor per rotary pair; a new pair is fitted to the old pair with the nearest frequency.

        With ``z = M_p + i M_(p + size/2)``, the two dimensions that rotate together, and w the same of N, the factor
        is ``<z, w> / |z|^2``: sums of four entries of ``M N^T`` and two of ``M M^T``. Dimensions that do not rotate
        are fitted among themselves without restriction.

        Args:
            gram: ``M M^T``.
            cross: ``M N^T``.

        Returns:
            T, ``(pairs, d_o, d_n)``.
        """
        old_half, new_half = self.old_size // 2, self.new_size // 2
        p, q = self._nearest(), torch.arange(new_half)
        size = (gram[:, p, p] + gram[:, p + old_half, p + old_half]).clamp(min=1e-300)
        real = (cross[:, p, q] + cross[:, p + old_half, q + new_half]) / size
        imaginary = (cross[:, p, q + new_half] - cross[:, p + old_half, q]) / size
        T = torch.zeros_like(cross)
        T[:, p, q] = T[:, p + old_half, q + new_half] = real
        T[:, p, q + new_half] = imaginary
        T[:, p + old_half, q] = -imaginary
        if self.old_size < gram.shape[1] and self.new_size < cross.shape[2]:
            rest = gram[:, self.old_size :, self.old_size :]
            T[:, self.old_size :, self.new_size :] = _solve_each(rest, cross[:, self.old_size :, self.new_size :])
        return T

    def _nearest(self) -> Tensor:
        """Return, for each new rotary pair, the index of the old pair with the nearest frequency."""
        old, new = (
            -2.0 * torch.arange(size // 2).double() / size * torch.tensor(theta).double().log()
            for size, theta in ((self.old_size, self.old_theta), (self.new_size, self.new_theta))
        )
        return (old[:, None] - new[None]).abs().argmin(dim=0)


@dataclass(frozen=True, eq=False)
class UnitFit:
    """Factors between the matched feed-forward units of a part.

    Attributes:
        scale: One factor per pair, ``(pairs,)``.
        residual: Relative residual over all matched units.
        norms: ``||W_o||_F`` and ``||W_n||_F`` over all matched units, ``(2,)``.
    """

    scale: Tensor
    residual: Tensor
    norms: Tensor


def fit_units(moved: Float[Tensor, "pairs width"], target: Float[Tensor, "pairs width"], old_norm: float) -> UnitFit:
    """Fit one factor per matched unit, ``scale * M ≈ N``, to weights in the new hidden basis or to their sketches.

    Args:
        moved: Weights M of the old units in the new hidden basis, or their sketches.
        target: Weights N of the new units, or their sketches.
        old_norm: Frobenius norm of the old units' weights.
    """
    scale = (moved * target).sum(dim=1) / (moved**2).sum(dim=1).clamp(min=1e-30)
    size = target.norm()
    residual = (scale[:, None] * moved - target).norm() / size if float(size) else torch.zeros(())
    return UnitFit(scale, residual, torch.tensor([old_norm, float(size)]))
