"""Pairs of samples of the same tensors of two backbones, whatever their names, layouts and multipliers."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..arch.config_values import SCALE_ROUNDING
from ..arch.experts import EXPERT_PARTS, Experts
from ..arch.layout import head_rows, split
from ..arch.spec import OUTPUT_PROJECTIONS, Architecture
from ..errors import LoraSuiteError
from ..io.checkpoint import evenly_spaced
from ..models.backbone import Backbone
from ..models.experts import read_expert, read_router
from ..models.quantized import quantization
from ..models.stored_names import find_stored
from .samples import KINDS, PLAIN_DTYPES

TABLE_ROWS, PART_ROWS = 16, 4
"""Rows that are compared of the embedding and of the head, and of each part of a projection."""

Pair = tuple[str, Tensor | None, Tensor | None, float | None]
"""Place of a sample, its values on both sides, and the factor from the old to the new ones; None for any factor."""


def residual_factor(old: Architecture, new: Architecture, part: str) -> float:
    """Return the factor of a part's weight: residual multipliers are folded into output projections by some formats."""
    return old.residual_scale / new.residual_scale if part in OUTPUT_PROJECTIONS else 1.0


def sample_pairs(old: Backbone, new: Backbone) -> Iterator[tuple[str, Iterator[Pair]]]:
    """Yield the kinds of tensors, and the pairs of samples of each."""
    yield "embedding rows", _embeddings(old, new)
    yield "norms", _norms(old, new)
    yield "projections", _projections(old, new)
    yield "biases", _biases(old, new)
    yield "head", _heads(old, new)
    if old.arch.experts is not None:
        yield "experts", _experts(old, new, old.arch.experts)


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
    for layer, site in old.arch.modules:
        for part in site.parts:
            factor = residual_factor(old.arch, new.arch, part)
            yield f"layer {layer}, {part}", _part_rows(old, layer, part), _part_rows(new, layer, part), factor


def _experts(old: Backbone, new: Backbone, experts: Experts) -> Iterator[Pair]:
    """Compare the routers, and a few rows of the first and the last expert."""
    readable = all(quantization(one.config) is None for one in (old, new))
    for layer in [layer for layer in range(old.arch.layers) if layer not in experts.dense]:
        if not readable:
            yield f"layer {layer}", None, None, 1.0
            continue
        yield f"layer {layer}, router", read_router(old, layer), read_router(new, layer), 1.0
        for expert in sorted({0, experts.count - 1}):
            for part in EXPERT_PARTS:
                left, right = (read_expert(one, layer, expert, part) for one in (old, new))
                rows = evenly_spaced(len(left), PART_ROWS)
                factor = residual_factor(old.arch, new.arch, part)
                yield f"layer {layer}, {part} of expert {expert}", left[rows], right[rows], factor


def _biases(old: Backbone, new: Backbone) -> Iterator[Pair]:
    for layer, site in old.arch.modules:
        for part in site.parts:
            if site.bias:
                left, right = (_bias(one, layer, part) for one in (old, new))
                yield f"layer {layer}, {part}", left, right, residual_factor(old.arch, new.arch, part)


def _norms(old: Backbone, new: Backbone) -> Iterator[Pair]:
    """Compare the gains that the architecture names, then other norms that have the same name in the layers of both."""
    offsets = old.arch.gain_offset, new.arch.gain_offset
    for layer in range(old.arch.layers):
        for part in [part for part in ("q", "up", *OUTPUT_PROJECTIONS) if part in old.arch.parts]:
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


def table_dtype(backbone: Backbone) -> torch.dtype:
    """Return the dtype of the stored embedding."""
    path = backbone.locate(f"{backbone.arch.embedding}.weight")
    dtype = backbone.weights.sample_rows(path, 1).dtype
    return dtype if dtype in PLAIN_DTYPES else torch.bfloat16


def _table_rows(backbone: Backbone, path: str, rows: list[int]) -> Tensor | None:
    stored = find_stored(f"{path}.weight", backbone.weights, backbone.arch)
    return None if stored is None else _plain(backbone, stored, rows, backbone.arch.hidden)


def _part_rows(backbone: Backbone, layer: int, part: str) -> Tensor | None:
    arch = backbone.arch.in_layer(layer)
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
    arch = backbone.arch.in_layer(layer)
    site = arch.site(part)
    stored = find_stored(f"{arch.layer_path}.{layer}.{site.path}.bias", backbone.weights, arch)
    return None if stored is None else split(backbone.weights[stored], site, arch)[part]
