"""DoRA's magnitudes: their ratios to the row norms, and DoRA as a plain LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from ..linalg.lowrank import LowRank, low_rank_approximation
from ..models.backbone import Backbone
from .adapter import Adapter, Key

SMALL = 1e-6
"""Rows shorter than this share of the longest one have no direction."""


def magnitude_ratios(adapter: Adapter, old: Backbone) -> dict[Key, Float[Tensor, " out"]]:
    """Return ``ρ = m / ||W + dV||`` of every row: DoRA's weight is ``diag(ρ) (W + dV)``."""
    found = {}
    for key, magnitude in adapter.magnitudes.items():
        norm = (old.part(*key) + adapter.updates[key].delta_weight()).norm(dim=1)
        found[key] = torch.where(norm > 0, magnitude / norm.clamp(min=1e-30), 1.0)
    return found


def dora_to_lora(adapter: Adapter, old: Backbone, rank: int | None) -> Adapter:
    """Make a DoRA a LoRA of its old backbone: the best low-rank part of what it truly changes, which has full rank.

    Args:
        adapter: The DoRA.
        old: Its backbone.
        rank: Rank of the result; each update's own by default.
    """
    scale, updates, kept = magnitude_ratios(adapter, old), dict(adapter.updates), []
    sites = {(layer, adapter.arch.site(part)) for layer, part in adapter.magnitudes}
    for layer, site in sorted(sites, key=lambda place: (place[0], place[1].path)):
        parts = [part for part in site.parts if (layer, part) in adapter.magnitudes]
        true = torch.cat([_true_change(old, (layer, part), updates[layer, part], scale) for part in parts])
        whole, energy = low_rank_approximation(true, rank or updates[layer, parts[0]].rank)
        kept.append(energy)
        rows = whole.B.split([adapter.arch.shape(part)[0] for part in parts])
        updates |= {(layer, part): LowRank(whole.A, B) for part, B in zip(parts, rows, strict=True)}
    facts = {"dora_as_lora": {"energy_kept": round(sum(kept) / len(kept), 6), "least": round(min(kept), 6)}}
    return replace(adapter, updates=updates, magnitudes={}, kind="lora", facts={**adapter.facts, **facts})


def _true_change(old: Backbone, key: Key, update: LowRank, scale: Mapping[Key, Tensor]) -> Tensor:
    weight = old.part(*key)
    return scale[key][:, None] * (weight + update.delta_weight()) - weight


def fill_zero_rows(update: LowRank, weight: Tensor) -> tuple[LowRank, Tensor, Tensor]:
    """Return the update with a direction for rows without length, all rows' lengths, and which had none."""
    norm = (weight + update.delta_weight()).norm(dim=1)
    empty = norm <= SMALL * norm.max()
    if not bool(empty.any()):
        return update, norm, empty
    column = int(update.A.norm(dim=1).argmax())
    length = float(update.A[column].norm())
    usual = float(norm[~empty].median()) if bool((~empty).any()) else 1.0
    B = update.B.clone()
    B[empty] = 0.0
    B[empty, column] = usual / length
    return LowRank(update.A, B, update.bias), norm, empty
