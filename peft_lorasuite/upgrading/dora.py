"""DoRA: the update's direction is carried as a LoRA, its magnitudes by how the old rows make up the new ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from ..adapters.adapter import Adapter, Key
from ..adapters.token_tables import both
from ..arch.layout import group_of
from ..arch.spec import ATTENTION, WRITERS
from ..errors import LoraSuiteError
from ..linalg.lowrank import LowRank, low_rank_of
from ..methods.base import Draft, Job
from ..models.backbone import Backbone

SMALL = 1e-6
"""Rows shorter than this share of the longest one have no direction."""


def ratios(adapter: Adapter, old: Backbone) -> dict[Key, Float[Tensor, " out"]]:
    """Return ``ρ = m / ||W + dV||`` of every row: DoRA's weight is ``diag(ρ) (W + dV)``."""
    found = {}
    for key, magnitude in adapter.magnitudes.items():
        norm = (old.part(*key) + adapter.updates[key].delta()).norm(dim=1)
        found[key] = torch.where(norm > 0, magnitude / norm.clamp(min=1e-30), 1.0)
    return found


def to_lora(adapter: Adapter, old: Backbone, rank: int | None) -> Adapter:
    """Make a DoRA a LoRA of its old backbone: the best low-rank part of what it truly changes, which has full rank.

    Args:
        adapter: The DoRA.
        old: Its backbone.
        rank: Rank of the result; each update's own by default.
    """
    scale, updates, kept = ratios(adapter, old), dict(adapter.updates), []
    sites = {(layer, adapter.arch.site(part)) for layer, part in adapter.magnitudes}
    for layer, site in sorted(sites, key=lambda place: (place[0], place[1].path)):
        parts = [part for part in site.parts if (layer, part) in adapter.magnitudes]
        true = torch.cat([_true_change(old, (layer, part), updates[layer, part], scale) for part in parts])
        whole, energy = low_rank_of(true, rank or updates[layer, parts[0]].rank)
        kept.append(energy)
        rows = whole.B.split([adapter.arch.shape(part)[0] for part in parts])
        updates |= {(layer, part): LowRank(whole.A, B) for part, B in zip(parts, rows, strict=True)}
    facts = {"dora_as_lora": {"energy_kept": round(sum(kept) / len(kept), 6), "least": round(min(kept), 6)}}
    return replace(adapter, updates=updates, magnitudes={}, kind="lora", facts={**adapter.facts, **facts})


def _true_change(old: Backbone, key: Key, update: LowRank, scale: Mapping[Key, Tensor]) -> Tensor:
    weight = old.part(*key)
    return scale[key][:, None] * (weight + update.delta()) - weight


def restored(result: Adapter, job: Job, draft: Draft, *, by_index: bool) -> Adapter:
    """Give an upgraded DoRA its magnitudes: ``m' = ||W_n + dV_n|| ρ_n``, exact where old rows become new ones whole.

    A row without length would make PEFT's DoRA divide by zero: it gets a direction and the magnitude zero, which
    leaves its output zero.

    Args:
        result: The carried directions, every module at its final rank.
        job: What was carried, with both backbones.
        draft: Where each update came from.
        by_index: Whether rows keep their number (`copy`) instead of going through the map.
    """
    old, new = both(job.old, job.new, "a DoRA's magnitudes depend on the weights")
    scale = ratios(job.adapter, old)
    updates, magnitudes = dict(result.updates), {}
    for layer, site in sorted({(n, result.arch.site(p)) for n, p in updates}, key=lambda at: (at[0], at[1].path)):
        keys = [(layer, part) for part in site.parts]
        for key in keys:
            update, rho = updates[key], torch.ones(result.arch.shape(key[1])[0])
            source = draft.sources.get(key)
            if source in scale:
                rho = _cropped(scale[source], len(rho)) if by_index else carried(scale[source], job, source, key)
            updates[key], norm, empty = _directed(update, new.part(*key))
            magnitudes[key] = torch.where(empty, 0.0, norm * rho)
    return replace(result, updates=updates, magnitudes=magnitudes, kind="dora")


def carried(rho: Float[Tensor, " old"], job: Job, source: Key, key: Key) -> Float[Tensor, " new"]:
    """Mix old ratios by the squares of the output map's entries, each row summing to one; 1 where it has no row."""
    layer, part = source
    pair = next((pair for pair in job.map.layers if (pair.old, pair.new) == (layer, key[0])), None)
    if pair is None:
        raise LoraSuiteError("the map does not match these layers", where=part, got=f"{layer} and {key[0]}")
    arch = job.map.new.arch
    if part in WRITERS:
        weights = (job.map.hidden.T * pair.gains[part][0]) ** 2
        return _mixed(weights @ rho, weights.sum(dim=1))
    top, low = torch.zeros(2, arch.shape(part)[0])
    if part not in ATTENTION:
        square = pair.unit_fits[part].scale ** 2
        top[pair.units[:, 1]], low[pair.units[:, 1]] = square * rho[pair.units[:, 0]], square
        return _mixed(top, low)
    left, right = pair.heads[:, 0], pair.heads[:, 1]
    if part in ("k", "v"):
        left, right = group_of(job.map.old.arch.heads)[left], group_of(arch.heads)[right]
    square = pair.head_fits[part].T.mT ** 2
    blocks = rho.reshape(-1, square.shape[2], 1)[left]
    shape = arch.heads.count(part), arch.heads.size
    top = torch.zeros(shape).index_add_(0, right, (square @ blocks)[..., 0]).flatten()
    low = torch.zeros(shape).index_add_(0, right, square.sum(dim=2)).flatten()
    return _mixed(top, low)


def _mixed(top: Tensor, low: Tensor) -> Tensor:
    known = low > 1e-12 * low.max()
    return torch.where(known, top / torch.where(known, low, 1.0), 1.0)


def _cropped(rho: Tensor, count: int) -> Tensor:
    return torch.cat([rho[:count], torch.ones(max(count - len(rho), 0))])


def _directed(update: LowRank, weight: Tensor) -> tuple[LowRank, Tensor, Tensor]:
    """Return the update with a direction for rows without length, all rows' lengths, and which had none."""
    norm = (weight + update.delta()).norm(dim=1)
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
