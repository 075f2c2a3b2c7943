"""LoRASuite (arXiv 2505.13515): transfer of the low-rank factors head by head and unit by unit, at the same rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..arch.layout import group_of, place_rows
from ..arch.spec import ATTENTION, OUTPUT_PROJECTIONS, Heads
from ..errors import unknown_name_error
from ..linalg.basis import EXACT, Basis, HeadFit, UnitFit
from ..linalg.lowrank import LowRank
from ..mapping.layer_pair import LayerPair
from ..mapping.upgrade_map import UpgradeMap
from .base import MethodInput, MethodResult
from .lorasuite_paper import paper_move
from .per_module import transfer_modules
from .registry import method

NORMALIZE = ("weights", "fit", "none")


@dataclass(frozen=True)
class LoraSuiteOptions:
    """Options of `lorasuite`.

    Attributes:
        normalize: ``"weights"``: an update whose head or unit map is not exact gets the norm, relative to its weight,
            that it had on the old backbone. ``"fit"``: the norm that the fit gives. ``"none"``: the formula of the
            paper's reference code, whose norm is arbitrary; it reads the weights of both backbones.
        gain: Factor on the whole update.
    """

    normalize: str = "weights"
    gain: float = 1.0

    def __post_init__(self) -> None:
        if self.normalize not in NORMALIZE:
            raise unknown_name_error("normalize", self.normalize, NORMALIZE)


@method("lorasuite", options=LoraSuiteOptions)
def lorasuite(inputs: MethodInput, options: LoraSuiteOptions) -> MethodResult:
    """Transfer every head and unit through the map's changes of basis (LoRASuite section 3.4, in its exact form)."""

    def transfer(pair: LayerPair, part: str, update: LowRank) -> tuple[LowRank, dict[str, float]]:
        if options.normalize == "none":
            moved, figures = paper_move(
                inputs.map, pair, part, update, *inputs.backbones("the method 'lorasuite' with normalize=none")
            )
        else:
            moved, figures = move(inputs.map, pair, part, update, match_size=options.normalize == "weights")
        return moved.scaled(options.gain), figures

    return transfer_modules(inputs, transfer)


def move(
    upgrade_map: UpgradeMap, pair: LayerPair, part: str, update: LowRank, *, match_size: bool
) -> tuple[LowRank, dict[str, float]]:
    """Transfer the update of one part to its new layer; also return figures for the report.

    Args:
        upgrade_map: The map of the pair.
        pair: The matched layers.
        part: The part.
        update: Its update on the old backbone.
        match_size: Whether to keep the norm of the update relative to its weight.
    """
    basis = upgrade_map.basis(pair, part)
    old, new = upgrade_map.old.arch, upgrade_map.new.arch
    if part in ATTENTION:
        return _move_heads(basis, pair, part, update, old.heads, new.heads, match_size)
    return _move_units(basis, pair, part, update, new.shape(part), match_size)


def _move_heads(
    basis: Basis, pair: LayerPair, part: str, update: LowRank, old: Heads, new: Heads, match_size: bool
) -> tuple[LowRank, dict[str, float]]:
    fit = pair.head_fits[part]
    left, right = pair.heads[:, 0], pair.heads[:, 1]
    if part in ("k", "v"):
        left, right = group_of(old)[left], group_of(new)[right]
    shared, own = _split_factors(update, part)
    blocks = own.reshape(old.count(part), old.size, -1)[left]
    moved = fit.T.mT @ blocks
    shared_moved = basis.map_outputs(shared) if part == "o" else basis.map_inputs(shared.T).T
    factor = _head_factors(fit, blocks, shared, moved, shared_moved) if match_size else torch.ones(len(moved))
    moved = moved * factor[:, None, None]
    rows, kept = place_rows(moved, right, new.count(part))
    figures = {"residual": float(fit.residual.mean()), "heads": float(len(left)), "merged": kept}
    if part == "o":
        bias = None if update.bias is None else basis.map_outputs(update.bias[:, None])[:, 0]
        return LowRank(rows.T, shared_moved, bias), figures
    bias = None
    if update.bias is not None:
        biases = (fit.T.mT @ update.bias.reshape(old.count(part), old.size, 1)[left]) * factor[:, None, None]
        bias = place_rows(biases, right, new.count(part))[0][:, 0]
    return LowRank(shared_moved.T, rows, bias), figures


def _split_factors(update: LowRank, part: str) -> tuple[Tensor, Tensor]:
    """Return the factor that all heads or units share, (D, r), and the one with their rows, (heads * d or I, r)."""
    return (update.B, update.A.T) if part in OUTPUT_PROJECTIONS else (update.A.T, update.B)


def _head_factors(fit: HeadFit, blocks: Tensor, shared: Tensor, moved: Tensor, shared_moved: Tensor) -> Tensor:
    """Return the factor of each head that keeps ``||dW|| / ||W||``; 1 where the fit is exact or a norm is zero."""
    before, after = _norms(blocks, shared), _norms(moved, shared_moved)
    wanted = before / fit.norms[:, 0].clamp(min=1e-30) * fit.norms[:, 1]
    usable = (fit.residual > EXACT) & (after > 0) & (fit.norms[:, 0] > 0)
    return torch.where(usable, wanted / after.clamp(min=1e-30), 1.0)


def _norms(blocks: Tensor, shared: Tensor) -> Tensor:
    """Return the Frobenius norm of ``block @ shared^T`` for every block, without forming the products."""
    return ((blocks.mT @ blocks) * (shared.T @ shared)).sum(dim=(1, 2)).clamp(min=0).sqrt()


def _move_units(
    basis: Basis, pair: LayerPair, part: str, update: LowRank, shape: tuple[int, int], match_size: bool
) -> tuple[LowRank, dict[str, float]]:
    fit = pair.unit_fits[part]
    left, right = pair.units[:, 0], pair.units[:, 1]
    shared, own = _split_factors(update, part)
    rows = own[left]
    moved = rows * fit.scale[:, None]
    shared_moved = basis.map_outputs(shared) if part == "down" else basis.map_inputs(shared.T).T
    factor = _unit_factor(fit, rows, shared, moved, shared_moved) if match_size else 1.0
    size = shape[1] if part == "down" else shape[0]
    placed = moved.new_zeros(size, moved.shape[1])
    placed[right] = moved * factor
    figures = {"residual": float(fit.residual), "units": float(len(left))}
    if part == "down":
        bias = None if update.bias is None else basis.map_outputs(update.bias[:, None])[:, 0]
        return LowRank(placed.T, shared_moved, bias), figures
    bias = None
    if update.bias is not None:
        bias = placed.new_zeros(size)
        bias[right] = update.bias[left] * fit.scale * factor
    return LowRank(shared_moved.T, placed, bias), figures


def _unit_factor(fit: UnitFit, rows: Tensor, shared: Tensor, moved: Tensor, shared_moved: Tensor) -> float:
    before, after = _norms(rows[None], shared), _norms(moved[None], shared_moved)
    if float(fit.residual) <= EXACT or not float(after) or not float(fit.norms[0]):
        return 1.0
    return float(before / fit.norms[0] * fit.norms[1] / after)
