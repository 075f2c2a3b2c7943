"""Transfer of updates of experts, between backbones with as many experts: by index, or matched by their routers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..adapters.experts import ExpertKey
from ..arch.experts import EXPERT_PARTS, ROUTER
from ..arch.spec import Architecture
from ..linalg.assignment import assign
from ..linalg.basis import EXACT, Basis, fit_units
from ..linalg.lowrank import LowRank
from ..mapping.layer_pair import LayerPair
from ..mapping.layers import match_units, units_first
from ..models.backbone import Backbone
from ..models.experts import read_expert, read_router
from .base import MethodInput, MovedExperts
from .units import move_units


def keep_experts(inputs: MethodInput, factors: Mapping[str, float] | None = None) -> MovedExperts:
    """Give every update to the same expert of the same layer.

    Args:
        inputs: The adapter and the map.
        factors: Part -> factor; by default 1.
    """
    old, new = inputs.map.old.arch, inputs.map.new.arch
    updates, dropped = {}, {}
    for (layer, expert, part), update in inputs.adapter.experts.items():
        reason = _obstacle(old, new, layer) or _other_shape(old, new)
        if reason:
            dropped[layer, expert, part] = reason
        else:
            updates[layer, expert, part] = update.scaled((factors or {}).get(part, 1.0))
    return MovedExperts(updates, {key: key for key in updates}, dropped)


def move_experts(inputs: MethodInput, *, match_size: bool) -> MovedExperts:
    """Match the experts of each pair of layers by their routers, and their units by the weights; then move each update.

    Args:
        inputs: The adapter, the map and both backbones.
        match_size: Whether to keep the norm of an update relative to its weight.
    """
    moved = MovedExperts({}, {}, {}, {})
    if not inputs.adapter.experts:
        return moved
    pairs = {pair.old: pair for pair in inputs.map.layers}
    for layer in sorted({layer for layer, _, _ in inputs.adapter.experts}):
        keys = [key for key in inputs.adapter.experts if key[0] == layer]
        pair = pairs.get(layer)
        reason = "no new layer is matched with this layer" if pair is None else ""
        reason = reason or _obstacle(inputs.map.old.arch, inputs.map.new.arch, pair.new if pair else layer)
        if not reason and (inputs.old is None or inputs.new is None):
            reason = "experts are matched by their weights: pass both backbones (--from and --to, old= and new=)"
        if reason or pair is None:
            moved.dropped.update(dict.fromkeys(keys, reason))
        else:
            _move_layer(inputs, pair, keys, moved, match_size=match_size)
    return moved


def _obstacle(old: Architecture, new: Architecture, layer: int) -> str:
    """Return why the experts of a layer have no counterpart in a new layer; empty if they have."""
    if new.experts is None or old.experts is None:
        return f"{new.family} has no experts"
    if layer >= new.layers or layer in new.experts.dense:
        return f"{new.family} has no experts in layer {layer}"
    if old.experts.count != new.experts.count:
        return f"the old layers have {old.experts.count} experts and the new ones {new.experts.count}"
    return ""


def _other_shape(old: Architecture, new: Architecture) -> str:
    shapes = [side.experts and (side.experts.intermediate, side.hidden) for side in (old, new)]
    return "" if shapes[0] == shapes[1] else "the experts have other shapes"


def _move_layer(
    inputs: MethodInput, pair: LayerPair, keys: list[ExpertKey], moved: MovedExperts, *, match_size: bool
) -> None:
    old, new = inputs.backbones("a transfer of experts")
    bases = _bases(inputs, pair, old, new)
    unit = torch.nn.functional.normalize
    routers = bases["gate"].map_inputs(read_router(old, pair.old)), read_router(new, pair.new)
    counterparts = dict(assign(unit(routers[0]) @ unit(routers[1]).T).tolist())
    if (pair.old, 0, ROUTER) in keys:
        router = inputs.adapter.experts[pair.old, 0, ROUTER]
        rows = torch.empty_like(router.B)
        rows[[counterparts[expert] for expert in range(len(rows))]] = router.B
        key = (pair.new, 0, ROUTER)
        moved.updates[key] = LowRank(bases["gate"].map_inputs(router.A), rows)
        moved.sources[key] = (pair.old, 0, ROUTER)
    for expert in sorted({expert for _, expert, part in keys if part != ROUTER}):
        target = counterparts[expert]
        matched = _match_expert(pair, bases, (old, expert), (new, target))
        for part in [part for part in EXPERT_PARTS if (pair.old, expert, part) in inputs.adapter.experts]:
            update = inputs.adapter.experts[pair.old, expert, part]
            shape = _experts_shape(new.arch, part)
            key = (pair.new, target, part)
            result, figures = move_units(bases[part], matched, part, update, shape, match_size)
            moved.updates[key], moved.sources[key], moved.figures[key] = result, (pair.old, expert, part), figures


def _experts_shape(arch: Architecture, part: str) -> tuple[int, int]:
    assert arch.experts is not None
    return arch.experts.shape(part, arch.hidden)


def _bases(inputs: MethodInput, pair: LayerPair, old: Backbone, new: Backbone) -> dict[str, Basis]:
    """Return the change of basis of every part of the experts of two layers."""
    hidden, inverse = inputs.map.hidden, inputs.map.inverse
    gains = [_gain(one, layer) for one, layer in ((old, pair.old), (new, pair.new))]
    read = Basis(hidden, inverse, gains[0], gains[1])
    ones = [torch.ones(one.arch.hidden) for one in (old, new)]
    residual = old.arch.residual_scale / new.arch.residual_scale
    return {"gate": read, "up": read, "down": Basis(hidden, inverse, *ones, normed=False, residual=residual)}


def _gain(backbone: Backbone, layer: int) -> Tensor:
    assert backbone.arch.experts is not None
    return backbone.tensor(f"{backbone.arch.layer_path}.{layer}.{backbone.arch.experts.norm}.weight")


def _match_expert(
    pair: LayerPair, bases: Mapping[str, Basis], old: tuple[Backbone, int], new: tuple[Backbone, int]
) -> LayerPair:
    """Match the units of two experts: in place if the weights are equal there, which saves the comparison of all."""
    left, right = (
        {part: units_first(read_expert(backbone, layer, expert, part), part) for part in EXPERT_PARTS}
        for (backbone, expert), layer in ((old, pair.old), (new, pair.new))
    )
    matrices = {part: bases[part].output_matrix() if part == "down" else bases[part].input_matrix() for part in left}
    if all(left[part].shape[0] == right[part].shape[0] for part in left):
        fits = {
            part: fit_units(left[part] @ matrices[part], right[part], float(left[part].norm())) for part in EXPERT_PARTS
        }
        if all(float(fit.residual) <= EXACT for fit in fits.values()):
            units = torch.arange(len(left["up"]))[:, None].expand(-1, 2)
            return replace(pair, units=units, unit_fits=fits)
    units, fits = match_units(left, right, matrices)
    return replace(pair, units=units, unit_fits=fits)
