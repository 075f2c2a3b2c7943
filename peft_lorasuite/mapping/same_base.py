"""Whether two backbones hold the same weights under other names and layouts: fused, folded, cast or quantized."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..arch.config_values import SCALE_ROUNDING
from ..arch.differences import SAME_FUNCTION
from ..arch.layout import head_rows, split
from ..arch.spec import OUTPUT_PROJECTIONS, Architecture
from ..errors import LoraSuiteError
from ..io.checkpoint import evenly_spaced
from ..models.backbone import Backbone
from ..models.quantized import quantization, unquantized_name
from ..models.stored_names import find_stored
from .samples import KINDS, PLAIN_DTYPES
from .upgrade_map import UpgradeMap

TABLE_ROWS, PART_ROWS = 16, 4
"""Rows that are compared of the embedding and of the head, and of each part of a projection."""
MAP_TOLERANCE = 4e-3
"""Largest difference of a map's fits from the identity for copies in other dtypes, which round by 2 to the power -8."""
EQUAL_SHARE = 0.9
"""Smallest share of values that are equal after rounding to the coarser dtype; the others differ in their last bit."""


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
    distance = upgrade_map.facts.get("hidden", {}).get("distance")
    if distance is None or distance > MAP_TOLERANCE:
        return Comparison("the embedding rows differ")
    if upgrade_map.pairs != [(layer, layer) for layer in range(old.layers)]:
        return Comparison("the layers are not matched in place")
    for pair in upgrade_map.layers:
        in_place = all(torch.equal(*matched.unbind(1)) for matched in (pair.heads, pair.units))
        fits = [fit.T - torch.eye(fit.T.shape[-1]) for fit in pair.head_fits.values()]
        fits += [fit.scale - 1 for fit in pair.unit_fits.values()]
        fits += [left - right for left, right in pair.gains.values()]
        fits += [fit.residual for fit in (*pair.head_fits.values(), *pair.unit_fits.values())]
        if not in_place or any(float(fit.abs().max()) > MAP_TOLERANCE for fit in fits):
            return Comparison(f"the map's fits of layer {pair.old} are not the identity")
    return Comparison("", ("embedding rows", "norms", "projections"), ("biases", "head"))


def residual_factor(old: Architecture, new: Architecture, part: str) -> float:
    """Return the factor of a part's weight: residual multipliers are folded into output projections by some formats."""
    return old.residual_scale / new.residual_scale if part in OUTPUT_PROJECTIONS else 1.0


def compare_bases(old: Backbone, new: Backbone) -> Comparison:
    """Compare a few rows of every tensor of two backbones, with their rows in head order.

    Weights of a quantized side that are not plain numbers are left out; then both names must be the same up to the
    suffix of the quantization.
    """
    if difference := _other_architecture(old.arch, new.arch):
        return Comparison(difference)
    equal, unread = [], []
    dtypes = [_table_dtype(one) for one in (old, new)]
    for kind, pairs in _pairs(old, new):
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
        "intermediate sizes": arch.intermediate,
        "parts": arch.parts,
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
    return "" if names[0] == names[1] else f"the {unread[0]} are quantized, and the names differ: {' and '.join(names)}"


Pair = tuple[str, Tensor | None, Tensor | None, float | None]
"""Place of a sample, its values on both sides, and the factor from the old to the new ones; None for any factor."""


def _pairs(old: Backbone, new: Backbone) -> Iterator[tuple[str, Iterator[Pair]]]:
    yield "embedding rows", _embeddings(old, new)
    yield "norms", _norms(old, new)
    yield "projections", _projections(old, new)
    yield "biases", _biases(old, new)
    yield "head", _heads(old, new)


def _embeddings(old: Backbone, new: Backbone) -> Iterator[Pair]:
    scales = old.arch.embedding_scale, new.arch.embedding_scale
    factor = 1.0 if math.isclose(*scales, rel_tol=SCALE_ROUNDING) else scales[0] / scales[1]
    left, right = (_table_rows(one, one.arch.embedding, _shared_rows(old, new)) for one in (old, new))
    yield old.arch.embedding, left, right, factor
    if old.arch.positions == "learned":
        for left, right in zip(*(list(KINDS["embedding"](one))[1:] for one in (old, new)), strict=False):
            yield left.path, left.values, right.values, 1.0


def _heads(old: Backbone, new: Backbone) -> Iterator[Pair]:
    """Compare the heads up to a factor, since some formats fold a multiplier of the logits into it."""
    paths = [one.arch.embedding if one.arch.tied else one.arch.head for one in (old, new)]
    rows = _shared_rows(old, new)
    yield old.arch.head, _table_rows(old, paths[0], rows), _table_rows(new, paths[1], rows), None


def _shared_rows(old: Backbone, new: Backbone) -> list[int]:
    return evenly_spaced(min(old.arch.vocabulary, new.arch.vocabulary), TABLE_ROWS)


def _projections(old: Backbone, new: Backbone) -> Iterator[Pair]:
    for layer in range(old.arch.layers):
        for part in old.arch.parts:
            factor = residual_factor(old.arch, new.arch, part)
            yield f"layer {layer}, {part}", _part_rows(old, layer, part), _part_rows(new, layer, part), factor


def _biases(old: Backbone, new: Backbone) -> Iterator[Pair]:
    for layer in range(old.arch.layers):
        for part in old.arch.parts:
            if old.arch.site(part).bias:
                left, right = (_bias(one, layer, part) for one in (old, new))
                yield f"layer {layer}, {part}", left, right, residual_factor(old.arch, new.arch, part)


def _norms(old: Backbone, new: Backbone) -> Iterator[Pair]:
    """Compare the gains that the architecture names, then other norms that have the same name in the layers of both."""
    offsets = old.arch.gain_offset, new.arch.gain_offset
    for layer in range(old.arch.layers):
        for part in ("q", "up", "o", "down"):
            yield f"layer {layer}, norm of {part}", old.gain(layer, part), new.gain(layer, part), 1.0
    left, right = (
        {
            sample.path.removeprefix(f"{one.arch.layer_path}.").replace(one.arch.final_norm, "final norm"): sample
            for sample in KINDS["norms"](one)
        }
        for one in (old, new)
    )
    for name in sorted(set(left) & set(right)) if offsets[0] == offsets[1] else []:
        yield name, left[name].values, right[name].values, 1.0


def _table_dtype(backbone: Backbone) -> torch.dtype:
    path = backbone.locate(f"{backbone.arch.embedding}.weight")
    dtype = backbone.weights.sample_rows(path, 1).dtype
    return dtype if dtype in PLAIN_DTYPES else torch.bfloat16


def _table_rows(backbone: Backbone, path: str, rows: list[int]) -> Tensor | None:
    stored = find_stored(f"{path}.weight", backbone.weights, backbone.arch)
    return None if stored is None else _plain(backbone, stored, rows, backbone.arch.hidden)


def _part_rows(backbone: Backbone, layer: int, part: str) -> Tensor | None:
    arch = backbone.arch
    site = arch.site(part)
    stored = find_stored(f"{arch.layer_path}.{layer}.{site.path}.weight", backbone.weights, arch)
    if stored is None:
        return None
    numbers = head_rows(site, arch)[part]
    rows = numbers[evenly_spaced(len(numbers), PART_ROWS)]
    if site.conv1d:
        return backbone.part(layer, part)[evenly_spaced(len(numbers), PART_ROWS)]
    return _plain(backbone, stored, rows.tolist(), arch.shape(part)[1])


def _plain(backbone: Backbone, stored: str, rows: list[int], width: int) -> Tensor | None:
    """Read rows of a matrix; None if they are not plain numbers of an unquantized matrix."""
    try:
        values = backbone.weights.rows(stored, rows)
    except LoraSuiteError:
        if quantization(backbone.config) is None:
            raise
        return None
    usable = values.dtype in PLAIN_DTYPES and not values.is_meta and tuple(values.shape) == (len(rows), width)
    return values if usable else None


def _bias(backbone: Backbone, layer: int, part: str) -> Tensor | None:
    arch = backbone.arch
    site = arch.site(part)
    stored = find_stored(f"{arch.layer_path}.{layer}.{site.path}.bias", backbone.weights, arch)
    return None if stored is None else split(backbone.weights[stored], site, arch)[part]


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
