"""DoRA: the update's direction is transferred as a LoRA, its magnitudes by how the old rows make up the new ones."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from ..adapters.adapter import Adapter, Key
from ..adapters.dora import fill_zero_rows, magnitude_ratios
from ..arch.layout import group_of
from ..arch.spec import ATTENTION, OUTPUT_PROJECTIONS
from ..errors import LoraSuiteError
from ..methods.base import MethodInput, MethodResult


def restore_magnitudes(result: Adapter, inputs: MethodInput, draft: MethodResult, *, by_index: bool) -> Adapter:
    """Give an upgraded DoRA its magnitudes: ``m' = ||W_n + dV_n|| ρ_n``, exact where old rows become new ones whole.

    A row without length would make PEFT's DoRA divide by zero: it gets a direction and the magnitude zero, which
    leaves its output zero.

    Args:
        result: The carried directions, every module at its final rank.
        inputs: What was transferred, with both backbones.
        draft: Where each update came from.
        by_index: Whether rows keep their number (`copy`) instead of going through the map.
    """
    old, new = inputs.backbones("a DoRA")
    scale = magnitude_ratios(inputs.adapter, old)
    updates, magnitudes = dict(result.updates), {}
    for layer, site in sorted({(n, result.arch.site(p)) for n, p in updates}, key=lambda at: (at[0], at[1].path)):
        keys = [(layer, part) for part in site.parts]
        for key in keys:
            update, rho = updates[key], torch.ones(result.arch.shape(key[1])[0])
            source = draft.sources.get(key)
            if source in scale:
                rho = (
                    _cropped(scale[source], len(rho))
                    if by_index
                    else transfer_ratios(scale[source], inputs, source, key)
                )
            updates[key], norm, empty = fill_zero_rows(update, new.part(*key))
            magnitudes[key] = torch.where(empty, 0.0, norm * rho)
    return replace(result, updates=updates, magnitudes=magnitudes, kind="dora")


def transfer_ratios(rho: Float[Tensor, " old"], inputs: MethodInput, source: Key, key: Key) -> Float[Tensor, " new"]:
    """Mix old ratios by the squares of the output map's entries, each row summing to one; 1 where it has no row."""
    layer, part = source
    pair = next((pair for pair in inputs.map.layers if (pair.old, pair.new) == (layer, key[0])), None)
    if pair is None:
        raise LoraSuiteError("the map does not match these layers", where=part, got=f"{layer} and {key[0]}")
    arch = inputs.map.new.arch
    if part in OUTPUT_PROJECTIONS:
        weights = (inputs.map.hidden.T * pair.gains[part][0]) ** 2
        return _mixed(weights @ rho, weights.sum(dim=1))
    top, low = torch.zeros(2, arch.shape(part)[0])
    if part not in ATTENTION:
        square = pair.unit_fits[part].scale ** 2
        top[pair.units[:, 1]], low[pair.units[:, 1]] = square * rho[pair.units[:, 0]], square
        return _mixed(top, low)
    left, right = pair.heads[:, 0], pair.heads[:, 1]
    if part in ("k", "v"):
        left, right = group_of(inputs.map.old.arch.heads)[left], group_of(arch.heads)[right]
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
