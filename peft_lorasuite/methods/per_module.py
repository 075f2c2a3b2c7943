"""The loop that methods share which transfer one part of one matched layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..adapters.adapter import Key
from ..linalg.lowrank import LowRank
from ..mapping.layer_pair import LayerPair
from ..mapping.upgrade_map import UpgradeMap
from .base import MethodInput, MethodResult

Transfer = Callable[[LayerPair, str, LowRank], tuple[LowRank, Mapping[str, float]]]
"""(matched layers, part, old update) -> new update, and figures for the report."""


def transfer_modules(inputs: MethodInput, transfer: Transfer) -> MethodResult:
    """Transfer every update whose layer is matched and whose part the new backbone has; give reasons for the others."""
    matched = {pair.old: pair for pair in inputs.map.layers}
    updates: dict[Key, LowRank] = {}
    sources: dict[Key, Key] = {}
    dropped: dict[Key, str] = {}
    figures: dict[Key, Mapping[str, float]] = {}
    for (layer, part), update in inputs.adapter.updates.items():
        pair = matched.get(layer)
        reason = drop_reason(inputs.map, pair, part)
        if reason or pair is None:
            dropped[layer, part] = reason
            continue
        updates[pair.new, part], figures[pair.new, part] = transfer(pair, part, update)
        sources[pair.new, part] = (layer, part)
    return MethodResult(updates, sources, dropped, figures)


def drop_reason(upgrade_map: UpgradeMap, pair: LayerPair | None, part: str) -> str:
    """Return why a part of an old layer cannot be transferred; empty if it can."""
    if pair is None:
        return "no new layer is matched with this layer"
    new = upgrade_map.new.arch
    if part not in new.parts:
        return f"{new.family} has no {part} projection"
    if not new.has(pair.new, part):
        return f"{new.family} has no {part} projection in layer {pair.new}, which is matched with this layer"
    if part not in pair.gains:
        if upgrade_map.old.arch.gives(pair.old, part) != new.gives(pair.new, part):
            return f"keys and values share a projection in one of this layer and layer {pair.new}, its match"
        return f"layer {pair.new}, which is matched with this layer, lacks others of q, k, v and o"
    return ""
