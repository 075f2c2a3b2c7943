"""Matching heads and feed-forward units of one pair of layers."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..arch.layout import group_of, heads_first, join
from ..arch.spec import ATTENTION, OUTPUT_PROJECTIONS, UNITS
from ..linalg.assignment import assign, assign_by_index, assign_units
from ..linalg.basis import Basis, HeadFit, Rotary, UnitFit, fit_heads, fit_units, part_basis, pseudo_inverse
from ..linalg.similarity import CHUNK, head_similarity, sketch, sketch_signs, unit_rows
from ..models.backbone import Backbone
from ..models.memory import release_memory
from .layer_pair import NO_UNITS, LayerPair
from .options import MapOptions


class LayerMatcher:
    """Matches heads and units of pairs of layers, reading the weights of one pair at a time.

    Args:
        old: The old backbone.
        new: The new backbone.
        hidden: The hidden map ``W_h``, (D_o, D_n).
        options: How to match.
    """

    def __init__(self, old: Backbone, new: Backbone, hidden: Tensor, options: MapOptions) -> None:
        self.old, self.new, self.options = old, new, options
        self.hidden, self.inverse = hidden, pseudo_inverse(hidden)
        self._heads = lru_cache(maxsize=1)(self._read_heads)  # the tie-break of the layer map and `match` read the same

    def weight_similarity(self, i: int, j: int) -> float:
        """Return the mean similarity of the matched heads of layers i and j, 0 without any: it decides ties."""
        scores = self._match_heads(i, j)[1]
        return float(scores.mean()) if len(scores) else 0.0

    def match(self, i: int, j: int) -> LayerPair:
        """Match the heads and units of old layer i and new layer j, and fit their maps."""
        heads, scores = self._match_heads(i, j)
        old, new, norms = self._heads(i, j)
        fits = {}
        for part in self._common(i, j, old):
            # with grouped queries, several query heads share a pair of key/value heads
            pairs, numbers = torch.stack(self._rows(i, j, part, heads), dim=1).unique(dim=0, return_inverse=True)
            left, right = pairs.T
            rotary = self._rotary(i, j) if part in ("q", "k") else None
            fit = fit_heads(old[part][left], new[part][right], norms[part][left], rotary)
            fits[part] = HeadFit(fit.T[numbers], fit.residual[numbers], fit.norms[numbers])
        (units, unit_fits), (ple_units, ple_fits) = (self._match_units(i, j, parts) for parts in UNITS)
        unit_fits |= ple_fits
        gains = {part: (self.old.gain(i, part), self.new.gain(j, part)) for part in (*fits, *unit_fits)}
        self._heads.cache_clear()
        release_memory()
        return LayerPair(i, j, heads, scores, fits, units, unit_fits, gains, ple_units)

    def _common(self, i: int, j: int, parts: Iterable[str]) -> list[str]:
        """Return the parts that both layers have, and use for the same: keys alone, or keys and values."""
        uses = [(part, self.old.arch.gives(i, part), self.new.arch.gives(j, part)) for part in parts]
        return [part for part, old, new in uses if old == new and old]

    def _match_heads(self, i: int, j: int) -> tuple[Tensor, Tensor]:
        old, new, _ = self._heads(i, j)
        if not old:
            return torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0)
        old_heads, new_heads = self.old.arch.in_layer(i).heads, self.new.arch.in_layer(j).heads
        scores = head_similarity(old, new, old_heads, new_heads)
        counts = old_heads.query, new_heads.query
        pairs = assign(scores) if self.options.head_map == "hungarian" else assign_by_index(*counts)
        return pairs, scores[pairs[:, 0], pairs[:, 1]]

    def _read_heads(self, i: int, j: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Read the heads of both layers, if both have all parts that the similarity of heads needs.

        Keys and values that a layer takes from another projection are read from there.

        Returns:
            Part -> old heads in the new hidden basis, (heads, d_o, D_n); part -> new heads, (heads, d_n, D_n);
            part -> norms of the old heads in their own basis, (heads,).
        """
        old, new, norms = {}, {}, {}
        found = {part: (self.old.arch.source(i, part), self.new.arch.source(j, part)) for part in ATTENTION}
        sources = {part: (left, right) for part, (left, right) in found.items() if left and right}
        for part, (left, right) in sources.items() if set(sources) >= {"q", "k", "v", "o"} else ():
            heads = read_heads(self.old, left, part)
            norms[part] = heads.flatten(1).norm(dim=1)
            rows, basis = heads.flatten(0, 1), self._basis(left[0], right[0], part)
            moved = basis.map_outputs(rows.T).T if part == "o" else basis.map_inputs(rows)
            old[part] = moved.unflatten(0, heads.shape[:2])
            new[part] = read_heads(self.new, right, part)
        return old, new, norms

    def _match_units(self, i: int, j: int, parts: Iterable[str]) -> tuple[Tensor, dict[str, Any]]:
        """Match the units of some parts, and fit their scales."""
        units = self._common(i, j, parts)
        if not units:  # experts are matched when an adapter of them is transferred
            return NO_UNITS, {}
        old, new = (
            {part: units_first(backbone.part(layer, part, None), part) for part in units}
            for backbone, layer in ((self.old, i), (self.new, j))
        )
        return match_units(old, new, {part: self._matrix(i, j, part) for part in units})

    def _matrix(self, i: int, j: int, part: str) -> Tensor:
        """Return the change of basis, (D_o, D_n), for units of a part, as rows over hidden dimensions."""
        basis = self._basis(i, j, part)
        return basis.output_matrix() if part in OUTPUT_PROJECTIONS else basis.input_matrix()

    def _basis(self, i: int, j: int, part: str) -> Basis:
        old, new = self.old.arch, self.new.arch
        return part_basis(old, new, part, self.hidden, self.inverse, (self.old.gain(i, part), self.new.gain(j, part)))

    def _rows(self, i: int, j: int, part: str, heads: Tensor) -> tuple[Tensor, Tensor]:
        """Return the old and new heads of a part for the matched query heads: with GQA, k and v use their groups."""
        left, right = heads[:, 0], heads[:, 1]
        if part in ("k", "v"):
            return group_of(self.old.arch.in_layer(i).heads)[left], group_of(self.new.arch.in_layer(j).heads)[right]
        return left, right

    def _rotary(self, i: int, j: int) -> Rotary | None:
        old, new = self.old.arch, self.new.arch
        bases = old.theta(i), new.theta(j)
        if old.positions != "rotary" or new.positions != "rotary" or not all(bases):
            return None
        return Rotary(old.in_layer(i).rotary_size, new.in_layer(j).rotary_size, *bases)


def read_heads(backbone: Backbone, source: tuple[int, str], part: str) -> Tensor:
    """Read the heads of a part, (heads, size, D), from the projection that gives them: a layer, and a part of it."""
    weight, arch = backbone.part(*source), backbone.arch.in_layer(source[0])
    if source[1] != part:  # values of a projection of keys, whose rows are in the order of rotary pairs
        weight = join({source[1]: weight}, arch.site(source[1]), arch)
    return heads_first(weight, part, arch.heads)


def match_units(
    old: dict[str, Tensor], new: dict[str, Tensor], matrices: dict[str, Tensor]
) -> tuple[Tensor, dict[str, UnitFit]]:
    """Match feed-forward units and fit their scales; wide layers are compared in sketches to save memory.

    Args:
        old: Part -> weights with one row per unit, (units, D_o). They are removed, to save memory.
        new: The same of the new layer, (units, D_n).
        matrices: Part -> change of basis, (D_o, D_n).
    """
    parts = list(old)
    norms, signs = {}, sketch_signs(parts, new[parts[0]].shape[1])
    for part in parts:
        old[part], norms[part] = _move_rows(old[part], sketch(matrices[part], signs[part]))
        new[part] = sketch(new[part], signs[part])
    pairs = assign_units(*unit_rows(old, new, sketches=None not in signs.values()))
    left, right = pairs[:, 0], pairs[:, 1]
    return pairs, {
        part: fit_units(old[part][left], new[part][right], float(norms[part][left].norm())) for part in parts
    }


def _move_rows(rows: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``rows @ matrix`` and the norms of the rows, in float32, without a float32 copy of all rows."""
    parts = (part.float() for part in rows.split(CHUNK))
    moved, norms = zip(*((part @ matrix, part.norm(dim=1)) for part in parts), strict=True)
    return torch.cat(moved), torch.cat(norms)


def units_first(weight: Tensor, part: str) -> Tensor:
    """View a weight with one row per unit; a unit of an output projection is a column."""
    return weight.T if part in OUTPUT_PROJECTIONS else weight
