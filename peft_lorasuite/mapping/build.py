"""Building an upgrade map: vocabulary, hidden map, layer map, then one matched layer at a time."""

from __future__ import annotations

import logging
import time
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..arch.layout import group_of, heads_first
from ..arch.spec import ATTENTION, WRITERS
from ..errors import LoraSuiteError
from ..linalg.assignment import assign, assign_units, by_index, fixed_path, layer_path
from ..linalg.basis import Basis, Rotary, fit_heads, fit_units, hidden_map, part_basis, pseudo_inverse
from ..linalg.similarity import head_similarity, layer_similarity, sketch_signs, sketched, unit_similarity
from ..models.activations import Sampling, calibration_texts, paired_activations
from ..models.backbone import Backbone
from ..models.distributed import share, together
from ..models.memory import give_back
from ..models.offload import placed
from ..progress import Progress, silent
from ..text.vocabulary import shared_tokens
from .fingerprint import identify
from .upgrade_map import LayerPair, MapOptions, UpgradeMap

log = logging.getLogger(__name__)

FIT_TOKENS = 16384
"""Shared tokens that the hidden map is fitted on, or eight times the hidden size if that is more. They are taken from
the low ids: in byte-pair vocabularies the frequent tokens, whose embeddings are trained best."""


def build_map(
    old: Any,
    new: Any,
    options: MapOptions,
    *,
    calibration: Any = None,
    device_map: Any = None,
    low_memory: bool = False,
    dtype: torch.dtype | str = "auto",
    progress: Progress = silent,
) -> UpgradeMap:
    """Build the upgrade map of a pair of backbones; several processes share the work, and each has the whole map.

    Args:
        old: Old backbone: folder, Hub id, loaded model or `Backbone`.
        new: New backbone, likewise.
        options: How to build it.
        calibration: Text for the layer similarity: None (built in), a text file, strings, or a `datasets.Dataset`.
        device_map: As in transformers, for the calibration runs.
        low_memory: The layers stay on disk while a model runs, and are read when their turn comes; the map is the same.
        dtype: Of the calibration runs; ``"auto"`` is the checkpoint's own.
        progress: Called with a title and an iterable, returns the iterable; `progress.bars` shows bars.
    """
    calibration = None if calibration is None else calibration_texts(calibration)  # refused before the long work
    device_map = placed(device_map, low_memory)
    old, new = Backbone.open(old), Backbone.open(new)
    start = time.perf_counter()
    identities = identify(old), identify(new)
    hidden, facts = _hidden(old, new, options)
    pairing = Pairing(old, new, hidden, options)
    similarity = torch.zeros(old.arch.layers, new.arch.layers)
    if options.layer_map == "cka":
        similarity = _similarity(old, new, options, calibration, device_map, dtype, progress)
        path = layer_path(similarity, pairing.weight_similarity)
    else:
        path = fixed_path(options.layer_map, old.arch.layers, new.arch.layers)
    calibrated = time.perf_counter()
    own = [(number, pairing.layer(i, j)) for number, (i, j) in progress("matching layers", share(path))]
    layers = tuple(together(own))
    facts["seconds"] = {
        "calibration": round(calibrated - start, 3),
        "weights": round(time.perf_counter() - calibrated, 3),
    }
    return UpgradeMap(*identities, options, hidden, pairing.inverse, similarity, layers, facts)


def _hidden(old: Backbone, new: Backbone, options: MapOptions) -> tuple[Tensor, dict[str, Any]]:
    """Fit the hidden map on the shared tokens and measure how well it tells them apart."""
    left, right = shared_tokens(
        old.tokenizer, new.tokenizer, old_rows=old.arch.vocabulary, new_rows=new.arch.vocabulary
    )
    if not len(left):
        raise LoraSuiteError(
            "the tokenizers share no token",
            where=f"{old!r} and {new!r}",
            do="this pair of backbones cannot be mapped: retrain the adapter",
        )
    count = max(FIT_TOKENS, 8 * old.arch.hidden)
    left, right = left[:count], right[:count]
    E_o, E_n = old.embedding(left), new.embedding(right)
    hidden = hidden_map(E_o, E_n, options.hidden_map)
    told: dict[str, float | None] = {"error": fit_error(E_o @ hidden, E_n)}
    told["agreement"] = agreement(E_o @ hidden, E_n)
    told["held_out"] = held_out_agreement(E_o, E_n, options.hidden_map)
    if E_o.shape == E_n.shape:
        told["distance"] = fit_error(E_o, E_n)
    facts = {"shared_tokens": len(left), "hidden": told}
    return hidden, facts


def fit_error(moved: Tensor, target: Tensor) -> float:
    """Relative error of the hidden map on the shared embeddings."""
    return round(float((moved - target).norm() / target.norm()), 6)


def agreement(moved: Tensor, target: Tensor, sample: int = 512) -> float:
    """Share of sampled tokens whose moved embedding is nearest, by cosine, to its own new embedding."""
    rows = torch.linspace(0, len(moved) - 1, min(sample, len(moved))).long()
    normalize = torch.nn.functional.normalize
    nearest = (normalize(moved[rows]) @ normalize(target).T).argmax(dim=1)
    return round(float((nearest == rows).float().mean()), 4)


def held_out_agreement(old: Tensor, new: Tensor, kind: str) -> float | None:
    """Agreement on every other token of a map that was fitted on the rest; None where the rest is too little.

    Where the tokens are few against the hidden size, a fit finds its own tokens again between any two backbones.
    """
    try:
        fitted = hidden_map(old[::2], new[::2], kind)
    except LoraSuiteError:
        return None
    return agreement(old[1::2] @ fitted, new[1::2])


def _similarity(
    old: Backbone, new: Backbone, options: MapOptions, calibration: Any, device_map: Any, dtype: Any, progress: Progress
) -> Tensor:
    texts = calibration_texts(calibration)
    sampling = Sampling(options.tokens, options.block, options.seed)
    for _ in progress("calibrating", [None]):
        pair = paired_activations(old, new, texts, sampling, device_map=device_map, dtype=dtype)
        return layer_similarity(options.similarity, pair.old, pair.new, block=options.block)
    raise LoraSuiteError("the calibration did not run")


class Pairing:
    """Matches heads and units of pairs of layers, reading each layer's weights when its turn comes."""

    def __init__(self, old: Backbone, new: Backbone, hidden: Tensor, options: MapOptions) -> None:
        self.old, self.new, self.options = old, new, options
        self.hidden, self.inverse = hidden, pseudo_inverse(hidden)
        self.attention = [part for part in ATTENTION if part in old.arch.parts and part in new.arch.parts]
        self.units = [part for part in ("gate", "up", "down") if part in old.arch.parts and part in new.arch.parts]
        self._heads = lru_cache(maxsize=1)(self._read_heads)

    def weight_similarity(self, i: int, j: int) -> float:
        """Mean similarity of the matched heads of an old and a new layer: the tie-break of the layer map."""
        return float(self._match_heads(i, j)[1].mean())

    def layer(self, i: int, j: int) -> LayerPair:
        """Match everything in one pair of layers."""
        heads, scores = self._match_heads(i, j)
        old, new, norms = self._heads(i, j)
        fits = {}
        for part in self.attention:
            left, right = self._numbers(part, heads)
            rotary = self._rotary(i, j) if part in ("q", "k") else None
            fits[part] = fit_heads(old[part][left], new[part][right], norms[part][left], rotary)
        units, unit_fits = self._match_units(i, j)
        gains = {part: (self.old.gain(i, part), self.new.gain(j, part)) for part in (*self.attention, *self.units)}
        self._heads.cache_clear()
        give_back()
        return LayerPair(i, j, heads, scores, fits, units, unit_fits, gains)

    def _match_heads(self, i: int, j: int) -> tuple[Tensor, Tensor]:
        old, new, _ = self._heads(i, j)
        scores = head_similarity(old, new, self.old.arch.heads, self.new.arch.heads)
        counts = self.old.arch.heads.query, self.new.arch.heads.query
        pairs = assign(scores) if self.options.head_map == "hungarian" else by_index(*counts)
        return pairs, scores[pairs[:, 0], pairs[:, 1]]

    def _read_heads(self, i: int, j: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Read both layers' heads, the old ones moved to the new hidden basis, and the old heads' own norms."""
        old, new, norms = {}, {}, {}
        for part in ATTENTION:
            heads = heads_first(self.old.part(i, part), part, self.old.arch.heads)
            norms[part] = heads.flatten(1).norm(dim=1)
            old[part] = (heads.flatten(0, 1) @ self._matrix(i, j, part)).unflatten(0, heads.shape[:2])
            new[part] = heads_first(self.new.part(j, part), part, self.new.arch.heads)
        return old, new, norms

    def _match_units(self, i: int, j: int) -> tuple[Tensor, dict[str, Any]]:
        """Match the feed-forward units; of wide layers only sketches are moved, a part is never moved whole."""
        old, new, raw = {}, {}, {}
        signs = sketch_signs(self.units, self.new.arch.hidden)
        for part in self.units:
            weight = _units_first(self.old.part(i, part), part)
            raw[part] = weight.norm(dim=1)
            old[part] = weight @ sketched(self._matrix(i, j, part), signs[part])
            new[part] = sketched(_units_first(self.new.part(j, part), part), signs[part])
        pairs = assign_units(unit_similarity(old, new, sketches=None not in signs.values()))
        left, right = pairs[:, 0], pairs[:, 1]
        return pairs, {
            part: fit_units(old[part][left], new[part][right], float(raw[part][left].norm())) for part in self.units
        }

    def _matrix(self, i: int, j: int, part: str) -> Tensor:
        """Change of basis ``(D_o, D_n)`` of a part's heads or units, each a row of old hidden dimensions."""
        basis = self._basis(i, j, part)
        return basis.writing() if part in WRITERS else basis.reading()

    def _basis(self, i: int, j: int, part: str) -> Basis:
        old, new = self.old.arch, self.new.arch
        return part_basis(old, new, part, self.hidden, self.inverse, (self.old.gain(i, part), self.new.gain(j, part)))

    def _numbers(self, part: str, heads: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the matched heads: query heads as they are, keys and values through their groups."""
        if part in ("q", "o"):
            return heads[:, 0], heads[:, 1]
        return group_of(self.old.arch.heads)[heads[:, 0]], group_of(self.new.arch.heads)[heads[:, 1]]

    def _rotary(self, i: int, j: int) -> Rotary | None:
        old, new = self.old.arch, self.new.arch
        if old.positions != "rotary" or new.positions != "rotary":
            return None
        return Rotary(old.rotary_size, new.rotary_size, old.theta(i), new.theta(j))


def _units_first(weight: Tensor, part: str) -> Tensor:
    """View a feed-forward weight as one row a unit; down's columns become rows."""
    return weight.T if part == "down" else weight
