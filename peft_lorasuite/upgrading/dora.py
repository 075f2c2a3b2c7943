"""Transferring the magnitudes of a DoRA; its direction is transferred like a LoRA."""

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


def restore_magnitudes(result: Adapter, inputs: MethodInput, method_result: MethodResult, *, by_index: bool) -> Adapter:
    """Compute the magnitudes ``m' = ||W_n + dV_n|| ρ_n`` of an upgraded DoRA, where ``ρ_n`` mixes the old ratios.

    They are exact if every new row is a single old row. A row of norm zero, by which PEFT's DoRA would divide, gets a
    direction and the magnitude zero, so that its output stays zero.

    Args:
        result: The transferred directions, each module at its final rank.
        inputs: The old adapter, with both backbones.
        method_result: Source of each update.
        by_index: Whether rows keep their index (`copy`) instead of being mapped.

    Raises:
        LoraSuiteError: If a backbone is missing, or the map does not match the layers of an update.
    """
    old, new = inputs.backbones("a DoRA")
    scale = magnitude_ratios(inputs.adapter, old)
    updates, magnitudes = dict(result.updates), {}
    sites = {(layer, result.arch.site(part)) for layer, part in updates}
    for layer, site in sorted(sites, key=lambda pair: (pair[0], pair[1].path)):
        keys = [(layer, part) for part in site.parts]
        for key in keys:
            update, rho = updates[key], torch.ones(result.arch.in_layer(layer).shape(key[1])[0])
            source = method_result.sources.get(key)
            if source in scale:
                old_rho = scale[source]
                rho = _crop(old_rho, len(rho)) if by_index else transfer_ratios(old_rho, inputs, source, key)
            updates[key], norm, empty = fill_zero_rows(update, new.part(*key))
            magnitudes[key] = torch.where(empty, 0.0, norm * rho)
    return replace(result, updates=updates, magnitudes=magnitudes, kind="dora")


def transfer_ratios(rho: Float[Tensor, " old"], inputs: MethodInput, source: Key, key: Key) -> Float[Tensor, " new"]:
    """Average the old ratios, weighted by the squared entries of the output map; 1 for a row that it does not reach.

    Args:
        rho: Ratio ``m / ||W + dV||`` of every old row.
        inputs: The map of the pair.
        source: Old layer and part.
        key: New layer and part.
    """
    layer, part = source
    pair = next((pair for pair in inputs.map.layers if (pair.old, pair.new) == (layer, key[0])), None)
    if pair is None:
        raise LoraSuiteError("the map does not match these layers", where=part, got=f"{layer} and {key[0]}")
    old_arch, arch = inputs.map.old.arch.in_layer(pair.old), inputs.map.new.arch.in_layer(pair.new)
    if part in OUTPUT_PROJECTIONS:
        weights = (inputs.map.hidden.T * pair.gains[part][0]) ** 2
        return _weighted_mean(weights @ rho, weights.sum(dim=1))
    total, weight = torch.zeros(2, arch.shape(part)[0])
    if part not in ATTENTION:
        square = pair.unit_fits[part].scale ** 2
        left, right = pair.units_of(part).unbind(1)
        total[right], weight[right] = square * rho[left], square
        return _weighted_mean(total, weight)
    left, right = pair.heads[:, 0], pair.heads[:, 1]
    if part in ("k", "v"):
        left, right = group_of(old_arch.heads)[left], group_of(arch.heads)[right]
    square = pair.head_fits[part].T.mT ** 2
    blocks = rho.reshape(-1, square.shape[2], 1)[left]
    shape = arch.heads.count(part), arch.heads.size
    total = torch.zeros(shape).index_add_(0, right, (square @ blocks)[..., 0]).flatten()
    weight = torch.zeros(shape).index_add_(0, right, square.sum(dim=2)).flatten()
    return _weighted_mean(total, weight)


def _weighted_mean(total: Tensor, weight: Tensor) -> Tensor:
    known = weight > 1e-12 * weight.max()
    return torch.where(known, total / torch.where(known, weight, 1.0), 1.0)


def _crop(rho: Tensor, count: int) -> Tensor:
    return torch.cat([rho[:count], torch.ones(max(count - len(rho), 0))])
