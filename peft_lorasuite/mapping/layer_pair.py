"""The records of an upgrade map: one per matched pair of layers, and one of all computed parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arch.spec import UNITS
from ..linalg.basis import HeadFit, UnitFit
from .fingerprint import Identity

NO_UNITS = torch.zeros(0, 2, dtype=torch.long)


@dataclass(frozen=True, eq=False)
class LayerPair:
    """The match of one old and one new layer.

    Attributes:
        old: Index of the old layer.
        new: Index of the new layer.
        heads: Matched query heads, old and new, int64 (pairs, 2).
        head_scores: Cosine similarity of each matched pair, (pairs,).
        head_fits: Part -> fit of every matched pair, for q, k, v, o; those of k and v are for the key/value heads of
            the matched query heads.
        units: Matched feed-forward units, old and new, int64 (pairs, 2).
        unit_fits: Part -> fit, for the feed-forward parts of both backbones.
        gains: Part -> gains of the old and the new norm, (D_o,) and (D_n,).
        ple_units: Matched units of the per-layer embeddings, likewise.
    """

    old: int
    new: int
    heads: Tensor
    head_scores: Tensor
    head_fits: Mapping[str, HeadFit]
    units: Tensor
    unit_fits: Mapping[str, UnitFit]
    gains: Mapping[str, tuple[Tensor, Tensor]]
    ple_units: Tensor = NO_UNITS

    def units_of(self, part: str) -> Tensor:
        """Return the matched units of a part outside attention."""
        return self.ple_units if part in UNITS[1] else self.units


class MapParts(NamedTuple):
    """The fields of an upgrade map that are computed, as `build` makes them and `storage` reads them.

    Attributes:
        old: Identity of the old backbone.
        new: Identity of the new backbone.
        hidden: ``W_h``, (D_o, D_n).
        inverse: ``pinv(W_h)``, (D_n, D_o).
        similarity: Similarity of all pairs of layers, (L_o, L_n); zeros where the layer map does not use it.
        layers: The matched layers, ascending.
        facts: Measurements of the build: shared tokens, fit of the hidden map, seconds.
    """

    old: Identity
    new: Identity
    hidden: Tensor
    inverse: Tensor
    similarity: Tensor
    layers: tuple[LayerPair, ...]
    facts: Mapping[str, Any]
