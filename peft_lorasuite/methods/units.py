"""Transfer of an update unit by unit, through the matched units of two feed-forward layers or experts."""

from __future__ import annotations

from torch import Tensor

from ..arch.spec import OUTPUT_PROJECTIONS
from ..linalg.basis import EXACT, Basis, UnitFit
from ..linalg.lowrank import LowRank
from ..mapping.layer_pair import LayerPair


def split_factors(update: LowRank, part: str) -> tuple[Tensor, Tensor]:
    """Return the factor that all heads or units share, (D, r), and the one with their rows, (heads * d or I, r)."""
    return (update.B, update.A.T) if part in OUTPUT_PROJECTIONS else (update.A.T, update.B)


def block_norms(blocks: Tensor, shared: Tensor) -> Tensor:
    """Return the Frobenius norm of ``block @ shared^T`` for every block, without forming the products."""
    return ((blocks.mT @ blocks) * (shared.T @ shared)).sum(dim=(1, 2)).clamp(min=0).sqrt()


def move_units(
    basis: Basis, pair: LayerPair, part: str, update: LowRank, shape: tuple[int, int], match_size: bool
) -> tuple[LowRank, dict[str, float]]:
    """Transfer the update of one feed-forward part; also return figures for the report.

    Args:
        basis: Change of basis of the part.
        pair: Matched layers, or experts, with their units.
        part: The part, one of `UNITS`.
        update: Its update on the old backbone.
        shape: Shape of the new weight, (out, in).
        match_size: Whether to keep the norm of the update relative to its weight.
    """
    fit = pair.unit_fits[part]
    left, right = pair.units_of(part).unbind(1)
    shared, own = split_factors(update, part)
    rows = own[left]
    moved = rows * fit.scale[:, None]
    shared_moved = basis.map_outputs(shared) if part in OUTPUT_PROJECTIONS else basis.map_inputs(shared.T).T
    factor = _unit_factor(fit, rows, shared, moved, shared_moved) if match_size else 1.0
    size = shape[1] if part in OUTPUT_PROJECTIONS else shape[0]
    placed = moved.new_zeros(size, moved.shape[1])
    placed[right] = moved * factor
    figures = {"residual": float(fit.residual), "units": float(len(left))}
    if part in OUTPUT_PROJECTIONS:
        bias = None if update.bias is None else basis.map_outputs(update.bias[:, None])[:, 0]
        return LowRank(placed.T, shared_moved, bias), figures
    bias = None
    if update.bias is not None:
        bias = placed.new_zeros(size)
        bias[right] = update.bias[left] * fit.scale * factor
    return LowRank(shared_moved.T, placed, bias), figures


def _unit_factor(fit: UnitFit, rows: Tensor, shared: Tensor, moved: Tensor, shared_moved: Tensor) -> float:
    before, after = block_norms(rows[None], shared), block_norms(moved[None], shared_moved)
    if float(fit.residual) <= EXACT or not float(after) or not float(fit.norms[0]):
        return 1.0
    return float(before / fit.norms[0] * fit.norms[1] / after)
