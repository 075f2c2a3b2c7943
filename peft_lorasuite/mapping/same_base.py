"""Whether two backbones hold the same weights under other names and layouts: fused, folded, cast or quantized."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..arch.differences import SAME_FUNCTION
from ..arch.spec import Architecture
from ..models.backbone import Backbone
from ..models.quantized import quantization, unquantized_name
from .sample_pairs import sample_pairs, table_dtype
from .upgrade_map import UpgradeMap

MAP_TOLERANCE = 4e-3
"""Largest difference of a map's fits from the identity for copies in other dtypes, which round by 2 to the power -8."""
PLAIN_SUFFIX = re.compile(r"-(?:bf16|fp16|f16|fp32|f32)$", re.IGNORECASE)
"""What the names of copies end with that were dequantized, or cast to another dtype."""
EQUAL_SHARE = 0.9
"""Smallest share of values that are equal after rounding to the coarser dtype."""


@dataclass(frozen=True)
class Comparison:
    """The comparison of two backbones.

    Attributes:
        difference: The first difference; empty if they hold the same weights.
        equal: Kinds of tensors whose sampled values are equal.
        unread: Kinds that cannot be compared, because one side is quantized or does not store them.
    """

    difference: str = ""
    equal: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()

    @property
    def same(self) -> bool:
        """Whether both backbones hold the same weights."""
        return not self.difference


def compare_pair(upgrade_map: UpgradeMap, old: Backbone | None, new: Backbone | None) -> Comparison:
    """Compare the backbones of a map: by their weights if both are given, else by what the map has of them."""
    if upgrade_map.source is None and (known := upgrade_map.facts.get("same_base")):
        return Comparison("", tuple(known["equal"]), tuple(known["unread"]))
    return _compare_by_map(upgrade_map) if old is None or new is None else compare_bases(old, new)


def _compare_by_map(upgrade_map: UpgradeMap) -> Comparison:
    """Compare the backbones by the fits of a map, in which equal weights are matched in place by the identity."""
    old, new = upgrade_map.old.arch, upgrade_map.new.arch
    if difference := _other_architecture(old, new):
        return Comparison(difference)
    if old.experts:
        return Comparison("the map has nothing of the experts")
    distance = upgrade_map.facts.get("hidden", {}).get("distance")
    if distance is None or distance > MAP_TOLERANCE:
        return Comparison("the embedding rows differ")
    if upgrade_map.pairs != [(layer, layer) for layer in range(old.layers)]:
        return Comparison("the layers are not matched in place")
    for pair in upgrade_map.layers:
        in_place = all(torch.equal(*one.unbind(1)) for one in (pair.heads, pair.units, pair.ple_units))
        fits = [fit.T - torch.eye(fit.T.shape[-1]) for fit in pair.head_fits.values()]
        fits += [fit.scale - 1 for fit in pair.unit_fits.values()]
        fits += [left - right for left, right in pair.gains.values()]
        fits += [fit.residual for fit in (*pair.head_fits.values(), *pair.unit_fits.values())]
        if not in_place or any(float(fit.abs().max()) > MAP_TOLERANCE for fit in fits):
            return Comparison(f"the map's fits of layer {pair.old} are not the identity")
    return Comparison("", ("embedding rows", "norms", "projections"), ("biases", "head"))


def compare_bases(old: Backbone, new: Backbone) -> Comparison:
    """Compare a few rows of every tensor of two backbones, with their rows in head order.

    Weights of a quantized side that are not plain numbers are left out; then both names must be the same up to the
    suffix of the quantization.
    """
    if difference := _other_architecture(old.arch, new.arch):
        return Comparison(difference)
    equal, unread = [], []
    dtypes = [table_dtype(one) for one in (old, new)]
    for kind, pairs in sample_pairs(old, new):
        shares = []
        for where, left, right, factor in pairs:
            if left is None or right is None:
                unread += [kind] if kind not in unread else []
                continue
            shares.append(_equal_share(left, right, factor, dtypes))
            if shares[-1] is None:
                return Comparison(f"the {kind} differ ({where})")
        known = [share for share in shares if share is not None]
        if known and sum(known) / len(known) < EQUAL_SHARE:
            return Comparison(f"the {kind} differ in the last bit of {1 - sum(known) / len(known):.0%} of the values")
        equal += [kind] if shares and kind not in unread else []
    if set(unread) - {"head"}:
        return Comparison(_other_name(old, new, unread), tuple(equal), tuple(unread))
    return Comparison("", tuple(equal), tuple(unread))


def _other_architecture(old: Architecture, new: Architecture) -> str:
    """Return the first value in which the functions of two architectures differ, whatever their names; else empty."""
    if not (old.has_converter and new.has_converter):
        return "a backbone has no converter"
    left, right = _function(old), _function(new)
    differing = [name for name in left if left[name] != right[name]]
    return next((f"the {name} differ: {left[name]} and {right[name]}" for name in differing), "")


def _function(arch: Architecture) -> dict[str, Any]:
    """Return what of an architecture determines its function, without names, layouts and multipliers."""
    rotary = arch.positions == "rotary"
    sites = {part: arch.site(part) for part in arch.parts}
    return {
        "numbers of layers": arch.layers,
        "hidden sizes": arch.hidden,
        "attention heads": arch.heads,
        "intermediate sizes": None if arch.experts else arch.intermediate,
        "experts": arch.experts and (arch.experts.count, arch.experts.intermediate, arch.experts.dense),
        "parts": arch.parts,
        "layers of parts": [site.layers for site in sites.values()],
        "layers of other sizes": arch.other_sizes,
        "shared keys and values": arch.borrowed,
        "sizes of per-layer embeddings": arch.ple_size,
        "biases": [part for part, site in sites.items() if site.bias],
        "norms": (arch.norm, arch.qk_norm, arch.embedding_norm is not None,
                  [(part, site.norm is not None, site.post_norm is not None) for part, site in sites.items()]),
        "activation functions": (SAME_FUNCTION.get(arch.activation, arch.activation), arch.activation_floor),
        "positions": (arch.positions, rotary and arch.rotary_size),
        "rotary bases": [arch.theta(layer) for layer in range(arch.layers)] if rotary else [],
        "orders of the blocks": "parallel" if arch.parallel else "one after the other",
    }  # fmt: skip


def _other_name(old: Backbone, new: Backbone, unread: list[str]) -> str:
    """Return why a quantized backbone is not taken for a copy of the other one; empty if its name says that it is."""
    if not any(quantization(one.config) for one in (old, new)):
        return f"the {unread[0]} cannot be read"
    names = [(unquantized_name(one.name) or one.name).rstrip("/").rpartition("/")[2] for one in (old, new)]
    names = [PLAIN_SUFFIX.sub("", name) for name in names]
    return "" if names[0] == names[1] else f"the {unread[0]} are quantized, and the names differ: {' and '.join(names)}"


def _equal_share(left: Tensor, right: Tensor, factor: float | None, dtypes: list[torch.dtype]) -> float | None:
    """Return the share of equal values after rounding to the coarser dtype; None if one differs by more than that.

    Args:
        left: Old values.
        right: New values.
        factor: From the old to the new values; None for any positive one.
        dtypes: Dtypes of both checkpoints.
    """
    if left.shape != right.shape:
        return None
    one, other = left.double(), right.double()
    if factor is None:
        factor = float((one * other).sum() / (one**2).sum().clamp(min=1e-300))
    coarse = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    precision = torch.finfo(coarse).eps
    floor = max(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps for dtype in dtypes)
    if factor <= 0 or bool(((one * factor - other).abs() > 2 * precision * other.abs() + 2 * floor).any()):
        return None
    if abs(factor - 1.0) > precision:  # a product is rounded once more
        return 1.0
    return float((one.to(coarse) == other.to(coarse)).float().mean())
