"""LoRASuite (arXiv 2505.13515): transfer of the low-rank factors head by head and unit by unit, at the same rank."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..arch.layout import group_of, place_rows
from ..arch.spec import ATTENTION, Heads
from ..errors import unknown_name_error
from ..linalg.basis import EXACT, Basis, HeadFit
from ..linalg.lowrank import LowRank
from ..mapping.layer_pair import LayerPair
from ..mapping.upgrade_map import UpgradeMap
from .base import MethodInput, MethodResult
from .experts import move_experts
from .lorasuite_paper import paper_move
from .per_module import transfer_modules
from .registry import method
from .units import block_norms, move_units, split_factors

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

    moved = move_experts(inputs, match_size=options.normalize != "fit")
    experts = {key: update.scaled(options.gain) for key, update in moved.updates.items()}
    return replace(transfer_modules(inputs, transfer), experts=replace(moved, updates=experts))


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
    old, new = upgrade_map.old.arch.in_layer(pair.old), upgrade_map.new.arch.in_layer(pair.new)
    if part in ATTENTION:
        return _move_heads(basis, pair, part, update, old.heads, new.heads, match_size)
    return move_units(basis, pair, part, update, new.shape(part), match_size)


def _move_heads(
    basis: Basis, pair: LayerPair, part: str, update: LowRank, old: Heads, new: Heads, match_size: bool
) -> tuple[LowRank, dict[str, float]]:
    fit = pair.head_fits[part]
    left, right = pair.heads[:, 0], pair.heads[:, 1]
    if part in ("k", "v"):
        left, right = group_of(old)[left], group_of(new)[right]
    shared, own = split_factors(update, part)
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


def _head_factors(fit: HeadFit, blocks: Tensor, shared: Tensor, moved: Tensor, shared_moved: Tensor) -> Tensor:
    """Return the factor of each head that keeps ``||dW|| / ||W||``; 1 where the fit is exact or a norm is zero."""
    before, after = block_norms(blocks, shared), block_norms(moved, shared_moved)
    wanted = before / fit.norms[:, 0].clamp(min=1e-30) * fit.norms[:, 1]
    usable = (fit.residual > EXACT) & (after > 0) & (fit.norms[:, 0] > 0)
    return torch.where(usable, wanted / after.clamp(min=1e-30), 1.0)
