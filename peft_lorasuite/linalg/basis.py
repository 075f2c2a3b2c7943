"""Changes of basis between two backbones: hidden size, heads, feed-forward units. Solves run in float64."""

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
"""A fit with a smaller relative residual explains the pair; its update keeps its size as computed."""
FLAT = 1e-5
"""Share of the largest direction of a map below which it is taken to have none."""
GAIN_FLOOR = 1e-3
"""Gains smaller than this share of their median are not divided by."""


def hidden_map(old: Float[Tensor, "tokens old"], new: Float[Tensor, "tokens new"], kind: str = "embeddings") -> Tensor:
    """Return ``W_h (D_o, D_n)``, so that ``h_n ≈ W_h^T h_o`` (LoRASuite section 3.1).

    Args:
        old: Embeddings of the shared tokens in the old backbone, with its multiplier.
        new: The same tokens in the new backbone.
        kind: ``"embeddings"``: least squares; ``"polar"``: its nearest semi-orthogonal map, which stands noise better;
            ``"identity"``: for equal hidden sizes, a bet on continued pre-training (the paper's choice there).
    """
    if kind not in HIDDEN_MAPS:
        raise unknown_name_error("hidden map", kind, HIDDEN_MAPS)
    size = old.shape[1]
    if kind == "identity":
        if size != new.shape[1]:
            raise LoraSuiteError(
                "the identity is no map between unequal hidden sizes",
                got=f"{size} and {new.shape[1]}",
                do="use embeddings",
            )
        return torch.eye(size)
    gram, cross = _normal_equations(old, new)
    values, vectors = torch.linalg.eigh(gram)
    if len(old) < size or float(values[0]) <= 1e-12 * float(values[-1]):
        raise LoraSuiteError(
            "the shared tokens do not span the old hidden space",
            got=f"rank {int((values > 1e-12 * values[-1]).sum())} from {len(old)} shared tokens",
            wanted=f"rank {size}",
            do='use hidden_map="identity" for a continued pre-training, or another pair of backbones',
        )
    W = vectors @ ((vectors.T @ cross) / values[:, None])
    if kind == "polar":
        U, _, Vt = torch.linalg.svd(W, full_matrices=False)
        W = U @ Vt
        W *= float(new.norm()) / float((W.T @ gram @ W).trace().sqrt())
    return W.float()


def _normal_equations(old: Tensor, new: Tensor, chunk: int = 8192) -> tuple[Tensor, Tensor]:
    gram = torch.zeros(old.shape[1], old.shape[1], dtype=torch.float64)
    cross = torch.zeros(old.shape[1], new.shape[1], dtype=torch.float64)
    for start in range(0, len(old), chunk):
        left, right = old[start : start + chunk].double(), new[start : start + chunk].double()
        gram += left.T @ left
        cross += left.T @ right
    return gram, cross


def pseudo_inverse(W: Float[Tensor, "old new"]) -> Float[Tensor, "new old"]:
    """Return ``pinv(W)``, by one Cholesky factorisation of the smaller Gram matrix where W has full rank.

    Directions smaller than `FLAT` of the largest are rounding errors of float32 and are not inverted.
    """
    W = W.double()
    wide = W.shape[0] <= W.shape[1]
    gram = W @ W.T if wide else W.T @ W
    factor, failed = torch.linalg.cholesky_ex(gram)
    heights = factor.diagonal()
    if int(failed) or float(heights.min()) < FLAT * float(heights.max()):
        return torch.linalg.pinv(W, rtol=FLAT).float()
    solved = torch.cholesky_solve(W if wide else W.T, factor)
    return (solved.T if wide else solved).float()


@dataclass(frozen=True, eq=False)
class Basis:
    """The change of basis of one matched layer for one part, kept in factors.

    Attributes:
        hidden: ``W_h (D_o, D_n)``.
        inverse: ``pinv(W_h) (D_n, D_o)``.
        old_gain: Gain of the old norm in front of a reader or behind a writer, (D_o,).
        new_gain: The same in the new backbone, (D_n,).
        normed: Whether a norm stands in front of the part in both backbones.
        residual: Old over new multiplier of what writers add to the residual stream.
    """

    hidden: Tensor
    inverse: Tensor
    old_gain: Tensor
    new_gain: Tensor
    normed: bool = True
    residual: float = 1.0

    def map_inputs(self, rows: Float[Tensor, "rows old"]) -> Float[Tensor, "rows new"]:
        """Return ``rows @ R_in``: what reads old hidden states, made to read new ones."""
        return (rows * self.old_gain) @ self.inverse.T * self._input_scale

    def map_outputs(self, columns: Float[Tensor, "old columns"]) -> Float[Tensor, "new columns"]:
        """Return ``R_out @ columns``: what writes old hidden states, made to write new ones."""
        return (self.hidden.T @ (columns * self.old_gain[:, None])) * self._output_scale[:, None]

    def input_matrix(self) -> Float[Tensor, "old new"]:
        """Form ``R_in = κ diag(g_o) pinv(W_h)^T diag(1/g_n)``, ``κ = ||W_h||_F / sqrt(D_n)`` behind a norm, else 1."""
        return self.old_gain[:, None] * self.inverse.T * self._input_scale

    def output_matrix(self) -> Float[Tensor, "old new"]:
        """Form ``R_out^T``, ``R_out = diag(1/g_n) W_h^T diag(g_o)`` times the residual multipliers' ratio."""
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
    """Return the change of basis of one part, whatever stands in front of or behind it in either family."""
    if part in OUTPUT_PROJECTIONS:
        return Basis(hidden, inverse, *gains, normed=False, residual=old.residual_scale / new.residual_scale)
    normed = old.site(part).norm is not None and new.site(part).norm is not None
    return Basis(hidden, inverse, *gains, normed=normed)


def clamp_gain(gain: Tensor) -> Tensor:
    """Keep a norm's gain away from zero, so that it can be divided by."""
    floor = GAIN_FLOOR * gain.abs().median().clamp(min=1e-30)
    return torch.where(gain.abs() < floor, torch.where(gain < 0, -floor, floor), gain)


@dataclass(frozen=True, eq=False)
class HeadFit:
    """Per matched head: the map, how well it explains the new head, and both heads' sizes.

    Attributes:
        T: ``(pairs, d_o, d_n)``.
        residual: Relative residual of each fit, (pairs,).
        norms: ``||W_o||_F`` and ``||W_n||_F`` of each pair, (pairs, 2).
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
        moved: Old heads' weights in the new hidden basis, M.
        target: New heads' weights, N.
        old_norms: Norms of the old heads' weights before they were moved.
        rotary: For q and k under rotary positions: a fit that is not exact is narrowed to one rotation and scale per
            rotary pair, the only maps that positions let through.
    """
    gram, cross, size = _products(moved, target)
    T = _solve(gram, cross)
    residual = _relative_residual(T, gram, cross, size)
    if rotary is not None and bool((residual > EXACT).any()):
        T = torch.where((residual > EXACT)[:, None, None], rotary.narrow(gram, cross), T)
        residual = _relative_residual(T, gram, cross, size)
    return HeadFit(T.float(), residual.float(), torch.stack([old_norms, size], dim=1).float())


def _products(moved: Tensor, target: Tensor, chunk: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """``M M^T``, ``M N^T`` and ``||N||`` of every pair in float64, a few at a time: large copies are slow to make."""
    found = []
    for left, right in zip(moved.split(chunk), target.split(chunk), strict=True):
        M, N = left.double(), right.double()
        found.append((M @ M.mT, M @ N.mT, N.flatten(1).norm(dim=1)))
    gram, cross, size = map(torch.cat, zip(*found, strict=True))
    return gram, cross, size


def _solve(gram: Tensor, cross: Tensor) -> Tensor:
    """Return ``pinv(gram) @ cross`` of every pair, by a Cholesky factor where the head has full rank."""
    factor, failed = torch.linalg.cholesky_ex(gram)
    heights = factor.diagonal(dim1=1, dim2=2)
    flat = (failed > 0) | (heights.amin(dim=1) <= FLAT * heights.amax(dim=1))
    T = torch.cholesky_solve(cross, factor)
    if bool(flat.any()):
        T[flat] = torch.linalg.pinv(gram[flat], hermitian=True, rtol=1e-12) @ cross[flat]
    return T


def _relative_residual(T: Tensor, gram: Tensor, cross: Tensor, size: Tensor) -> Tensor:
    """``||T^T M - N|| / ||N||`` from ``M M^T``, ``M N^T`` and ``||N||``: float64 leaves it exact to 1e-8."""
    square = ((gram @ T - 2 * cross) * T).sum(dim=(1, 2)) + size**2
    return torch.where(size > 0, square.clamp(min=0).sqrt() / size.clamp(min=1e-300), 0.0)


@dataclass(frozen=True)
class Rotary:
    """Rotary positions of an old and a new layer: rotated dimensions (they come first) and frequency base of each."""

    old_size: int
    new_size: int
    old_theta: float
    new_theta: float

    def narrow(
        self, gram: Float[Tensor, "pairs size_o size_o"], cross: Float[Tensor, "pairs size_o size_n"]
    ) -> Float[Tensor, "pairs size_o size_n"]:
        """Fit one complex factor per rotary pair; a new pair takes the old pair of the nearest frequency.

        With ``z = M_p + i M_(p + size/2)``, the two dimensions that turn together, and w likewise of N, the factor is
        ``<z, w> / |z|^2``: sums of four entries of ``M N^T`` and two of ``M M^T``. Dimensions that do not turn are
        fitted freely among themselves.
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
            still = gram[:, self.old_size :, self.old_size :]
            T[:, self.old_size :, self.new_size :] = _solve(still, cross[:, self.old_size :, self.new_size :])
        return T

    def _nearest(self) -> Tensor:
        """Index of the old rotary pair whose frequency is nearest to each new one's."""
        old, new = (
            -2.0 * torch.arange(size // 2).double() / size * torch.tensor(theta).double().log()
            for size, theta in ((self.old_size, self.old_theta), (self.new_size, self.new_theta))
        )
        return (old[:, None] - new[None]).abs().argmin(dim=0)


@dataclass(frozen=True, eq=False)
class UnitFit:
    """Per matched feed-forward unit: one factor; and for the whole part its residual and both sizes.

    Attributes:
        scale: ``(pairs,)``.
        residual: Relative residual over all matched units.
        norms: ``||W_o||_F`` and ``||W_n||_F`` over the matched units, (2,).
    """

    scale: Tensor
    residual: Tensor
    norms: Tensor


def fit_units(moved: Float[Tensor, "pairs width"], target: Float[Tensor, "pairs width"], old_norm: float) -> UnitFit:
    """Fit one factor per matched unit: ``scale * M ≈ N``, from weights in the new hidden basis or their sketches."""
    scale = (moved * target).sum(dim=1) / (moved**2).sum(dim=1).clamp(min=1e-30)
    size = target.norm()
    residual = (scale[:, None] * moved - target).norm() / size if float(size) else torch.zeros(())
    return UnitFit(scale, residual, torch.tensor([old_norm, float(size)]))
