"""Matching heads and feed-forward units of one pair of layers."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..arch.layout import group_of, heads_first
from ..arch.spec import ATTENTION, OUTPUT_PROJECTIONS
from ..linalg.assignment import assign, assign_by_index, assign_units
from ..linalg.basis import Basis, HeadFit, Rotary, UnitFit, fit_heads, fit_units, part_basis, pseudo_inverse
from ..linalg.similarity import CHUNK, head_similarity, sketch, sketch_signs, unit_rows
from ..models.backbone import Backbone
from ..models.memory import release_memory
from .layer_pair import LayerPair
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
        for part in old:
            # with grouped queries, several query heads share a pair of key/value heads
            pairs, numbers = torch.stack(self._rows(part, heads), dim=1).unique(dim=0, return_inverse=True)
            left, right = pairs.T
            rotary = self._rotary(i, j) if part in ("q", "k") else None
            fit = fit_heads(old[part][left], new[part][right], norms[part][left], rotary)
            fits[part] = HeadFit(fit.T[numbers], fit.residual[numbers], fit.norms[numbers])
        units, unit_fits = self._match_units(i, j)
        gains = {part: (self.old.gain(i, part), self.new.gain(j, part)) for part in (*fits, *unit_fits)}
        self._heads.cache_clear()
        release_memory()
        return LayerPair(i, j, heads, scores, fits, units, unit_fits, gains)

    def _common(self, i: int, j: int, parts: Iterable[str]) -> list[str]:
        return [part for part in parts if self.old.arch.has(i, part) and self.new.arch.has(j, part)]

    def _match_heads(self, i: int, j: int) -> tuple[Tensor, Tensor]:
        old, new, _ = self._heads(i, j)
        if not old:
            return torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0)
        scores = head_similarity(old, new, self.old.arch.heads, self.new.arch.heads)
        counts = self.old.arch.heads.query, self.new.arch.heads.query
        pairs = assign(scores) if self.options.head_map == "hungarian" else assign_by_index(*counts)
        return pairs, scores[pairs[:, 0], pairs[:, 1]]

    def _read_heads(self, i: int, j: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Read the heads of both layers, if both have all parts that the similarity of heads needs.

        Returns:
            Part -> old heads in the new hidden basis, (heads, d_o, D_n); part -> new heads, (heads, d_n, D_n);
            part -> norms of the old heads in their own basis, (heads,).
        """
        old, new, norms = {}, {}, {}
        common = self._common(i, j, ATTENTION)
        for part in common if set(common) >= {"q", "k", "v", "o"} else ():
            heads = heads_first(self.old.part(i, part), part, self.old.arch.heads)
            norms[part] = heads.flatten(1).norm(dim=1)
            rows, basis = heads.flatten(0, 1), self._basis(i, j, part)
            moved = basis.map_outputs(rows.T).T if part == "o" else basis.map_inputs(rows)
            old[part] = moved.unflatten(0, heads.shape[:2])
            new[part] = heads_first(self.new.part(j, part), part, self.new.arch.heads)
        return old, new, norms

    def _match_units(self, i: int, j: int) -> tuple[Tensor, dict[str, Any]]:
        """Match the feed-forward units and fit their scales."""
        units = self._common(i, j, ("gate", "up", "down"))
        if not units:  # experts are matched when an adapter of them is transferred
            return torch.zeros(0, 2, dtype=torch.long), {}
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

    def _rows(self, part: str, heads: Tensor) -> tuple[Tensor, Tensor]:
        """Return the old and new heads of a part for the matched query heads: with GQA, k and v use their groups."""
        if part in ("k", "v"):
            return group_of(self.old.arch.heads)[heads[:, 0]], group_of(self.new.arch.heads)[heads[:, 1]]
        return heads[:, 0], heads[:, 1]

    def _rotary(self, i: int, j: int) -> Rotary | None:
        old, new = self.old.arch, self.new.arch
        bases = old.theta(i), new.theta(j)
        if old.positions != "rotary" or new.positions != "rotary" or not all(bases):
            return None
        return Rotary(old.rotary_size, new.rotary_size, *bases)


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
    """View a feed-forward weight with one row per unit; a unit of ``down`` is a column."""
    return weight.T if part == "down" else weight
