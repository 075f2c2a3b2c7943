"""DoRA: ratios of its magnitudes to the row norms, and its conversion to LoRA."""

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
"""Rows with a norm below this fraction of the largest one count as zero."""


def magnitude_ratios(adapter: Adapter, old: Backbone) -> dict[Key, Float[Tensor, " out"]]:
    """Return ``ρ = m / ||W + B A||`` of every row; the weight with DoRA is ``diag(ρ) (W + B A)``."""
    ratios = {}
    for key, magnitude in adapter.magnitudes.items():
        norm = (old.part(*key) + adapter.updates[key].delta_weight()).norm(dim=1)
        ratios[key] = torch.where(norm > 0, magnitude / norm.clamp(min=1e-30), 1.0)
    return ratios


def dora_to_lora(adapter: Adapter, old: Backbone, rank: int | None) -> Adapter:
    """Convert a DoRA to a LoRA of its backbone: the best low-rank approximation of its full-rank change.

    Args:
        adapter: The DoRA.
        old: Its backbone.
        rank: Rank of the result; by default the rank of each update.
    """
    ratios, updates, kept = magnitude_ratios(adapter, old), dict(adapter.updates), []
    sites = {(layer, adapter.arch.site(part)) for layer, part in adapter.magnitudes}
    for layer, site in sorted(sites, key=lambda key: (key[0], key[1].path)):
        parts = [part for part in site.parts if (layer, part) in adapter.magnitudes]
        change = torch.cat([_weight_change(old, (layer, part), updates[layer, part], ratios) for part in parts])
        whole, energy = low_rank_approximation(change, rank or updates[layer, parts[0]].rank)
        kept.append(energy)
        rows = whole.B.split([adapter.arch.in_layer(layer).shape(part)[0] for part in parts])
        updates |= {(layer, part): LowRank(whole.A, B) for part, B in zip(parts, rows, strict=True)}
    facts = {"dora_as_lora": {"energy_kept": round(sum(kept) / len(kept), 6), "least": round(min(kept), 6)}}
    return replace(adapter, updates=updates, magnitudes={}, kind="lora", facts={**adapter.facts, **facts})


def _weight_change(old: Backbone, key: Key, update: LowRank, ratios: Mapping[Key, Tensor]) -> Tensor:
    weight = old.part(*key)
    return ratios[key][:, None] * (weight + update.delta_weight()) - weight


def fill_zero_rows(update: LowRank, weight: Tensor) -> tuple[LowRank, Tensor, Tensor]:
    """Change the update where ``weight + B A`` has rows of zeros, by whose norm PEFT's DoRA would divide.

    Such rows get the direction of the largest row of A, with the median norm.

    Args:
        update: The update.
        weight: Weight of the backbone, ``(out, in)``.

    Returns:
        The update, the norms of all rows before the change, ``(out,)``, and which rows were zero, ``(out,)``.
    """
    norm = (weight + update.delta_weight()).norm(dim=1)
    zero = norm <= SMALL * norm.max()
    if not bool(zero.any()):
        return update, norm, zero
    largest = int(update.A.norm(dim=1).argmax())
    median = float(norm[~zero].median()) if bool((~zero).any()) else 1.0
    B = update.B.clone()
    B[zero] = 0.0
    B[zero, largest] = median / float(update.A[largest].norm())
    return LowRank(update.A, B, update.bias), norm, zero
