"""Upgrade maps as tensors and JSON values: flattened on saving, checked and rebuilt on loading."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..arch.experts import Experts
from ..arch.spec import ATTENTION, PARTS, UNITS, Architecture, Borrowed, Heads, LayerSizes
from ..errors import LoraSuiteError
from ..io.dataclass_schema import record_of
from ..io.json_file import read_json
from ..io.schema import NAME, PLAIN, Kind, ListOf, Record, check, integer, number, one_of, optional, table_of
from ..linalg.basis import HeadFit, UnitFit, pseudo_inverse
from .fingerprint import Identity
from .layer_pair import NO_UNITS, LayerPair, MapParts
from .options import MapOptions
from .samples import KINDS

FORMAT = 3
_size, _share, _layer = integer(1, 2**31 - 1), optional(number()), integer(0, 10**5)
_heads = record_of(Heads, query=_size, key_value=_size, size=_size)
_sizes = record_of(
    LayerSizes, layers=ListOf(item=_layer), heads=_heads, intermediate=_size, rotary_size=integer(0, 2**31 - 1)
)
_borrowed = record_of(Borrowed, layer=_layer, part=one_of("k", "v"), from_layer=_layer, from_part=one_of("k", "v"))
ARCHITECTURE = record_of(
    Architecture,
    layers=integer(1, 10**5), hidden=_size, intermediate=_size, vocabulary=_size, rotary_size=integer(0, 2**31 - 1),
    heads=_heads, norm=one_of("rms", "layer"),
    positions=one_of("rotary", "alibi", "learned"), rope_thetas=ListOf(item=number(0.0), fewest=1),
    experts=optional(record_of(Experts, count=_size, intermediate=_size)),
    embedding_scale=number(above=0.0), residual_scale=number(above=0.0), other_weights=integer(0),
    activation_floor=number(0.0), other_sizes=ListOf(item=_sizes), borrowed=ListOf(item=_borrowed),
    ple_size=integer(0, 2**31 - 1),
)  # fmt: skip
_hash = Kind("a SHA-256", lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None)
_samples = Record(fields=dict.fromkeys(KINDS, _hash), required=list(KINDS))
_identity = record_of(Identity, arch=ARCHITECTURE, tokenizer=_hash, samples=_samples)
_section = {
    "file": NAME, "bytes": integer(0), "parts": ListOf(item=one_of(*PARTS)), "settings": table_of(PLAIN),
    "map": NAME,
}  # fmt: skip
_facts = {
    "shared_tokens": integer(0), "seconds": table_of(number(0.0)),
    "hidden": Record(fields=dict.fromkeys(("error", "agreement", "held_out", "distance"), _share), others=PLAIN),
}  # fmt: skip
_fields = {
    "format": integer(), "version": NAME, "old": _identity, "new": _identity, "options": record_of(MapOptions),
    "layers": ListOf(item=ListOf(item=integer(0, 10**5), fewest=2, most=2)),
    "facts": Record(fields=_facts, others=PLAIN),
    "sections": table_of(Record(fields=_section, required=list(_section))),
}  # fmt: skip
MAP = Record(fields=_fields, required=[name for name in _fields if name not in ("version", "sections")])
"""Schema of ``map.json``."""


def read_description(path: Path, *, where: str) -> dict[str, Any]:
    """Read ``map.json`` and check its format and every type and bound in it.

    Args:
        path: The file.
        where: Its name for error messages.
    """
    values = read_json(path, where=where)
    if values.get("format") != FORMAT:
        raise LoraSuiteError(
            "unsupported format of the upgrade map", where=where, got=values.get("format"), wanted=FORMAT,
            do="build it again with this version (peft-lorasuite map OLD NEW -o DIR)",
        )  # fmt: skip
    check(values, MAP, where=where, do="build or fetch it again")
    return values


def flatten(hidden: Tensor, similarity: Tensor, layers: Iterable[LayerPair]) -> dict[str, Tensor]:
    """Return copies of the tensors of a map by the names that `rebuild` reads; the inverse is recomputed on loading."""
    return {name: tensor.contiguous().clone() for name, tensor in _name_tensors(hidden, similarity, layers).items()}


def check_finite(hidden: Tensor, similarity: Tensor, layers: Iterable[LayerPair]) -> None:
    """Raise `LoraSuiteError` for values that are not finite, in a map that was built of weights out of range."""
    for name, tensor in _name_tensors(hidden, similarity, layers).items():
        if not torch.isfinite(tensor).all():
            raise LoraSuiteError(
                "the map's values are not finite: the weights of a backbone are out of range", where=name,
                do="train or fetch the backbones again",
            )  # fmt: skip


def _name_tensors(hidden: Tensor, similarity: Tensor, layers: Iterable[LayerPair]) -> dict[str, Tensor]:
    tensors = {"hidden": hidden, "similarity": similarity}
    for pair in layers:
        here = f"layers.{pair.new}"
        tensors |= {f"{here}.heads": pair.heads, f"{here}.head_scores": pair.head_scores, f"{here}.units": pair.units}
        tensors |= {f"{here}.ple_units": pair.ple_units} if len(pair.ple_units) else {}
        for part, fit in pair.head_fits.items():
            tensors |= {f"{here}.{part}.{name}": getattr(fit, name) for name in ("T", "residual", "norms")}
        for part, fit in pair.unit_fits.items():
            tensors |= {f"{here}.{part}.{name}": getattr(fit, name) for name in ("scale", "residual", "norms")}
        for part, (old, new) in pair.gains.items():
            tensors |= {f"{here}.{part}.old_gain": old, f"{here}.{part}.new_gain": new}
    return tensors


def rebuild(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> MapParts:
    """Return the parts of a map from its JSON values and tensors.

    Raises:
        LoraSuiteError: For a tensor of the wrong shape, matched indices out of range, and unexpected tensors.
    """
    old, new = Identity.from_dict(meta["old"]), Identity.from_dict(meta["new"])
    mapped = old.arch.has_converter and new.arch.has_converter
    if bool(meta["layers"]) != mapped:
        raise LoraSuiteError(
            "the map has matched layers exactly if both backbones have converters", do="build or fetch it again"
        )
    if not mapped:
        reader = _TensorReader(tensors)
        hidden, similarity = reader("hidden", 0, 0), reader("similarity", 0, 0)
        reader.close()
        return MapParts(old, new, hidden, hidden, similarity, (), meta["facts"])
    _check_pairs(torch.tensor(meta["layers"]), (old.arch.layers, new.arch.layers), "layers")
    if any(i > k or j >= m for (i, j), (k, m) in pairwise(meta["layers"])):
        raise LoraSuiteError("the map has a malformed layer map", do="build or fetch it again")
    read = _TensorReader(tensors)
    hidden = read("hidden", old.arch.hidden, new.arch.hidden)
    similarity = read("similarity", old.arch.layers, new.arch.layers)
    layers = tuple(_rebuild_pair(i, j, old.arch, new.arch, read) for i, j in meta["layers"])
    read.close()
    return MapParts(old, new, hidden, pseudo_inverse(hidden), similarity, layers, meta["facts"])


def _rebuild_pair(i: int, j: int, old: Architecture, new: Architecture, read: _TensorReader) -> LayerPair:
    here, old, new = f"layers.{j}", old.in_layer(i), new.in_layer(j)
    heads = read.pairs(f"{here}.heads", (old.heads.query, new.heads.query))
    units = read.pairs(f"{here}.units", (old.intermediate, new.intermediate))
    ple = f"{here}.ple_units"
    ple_units = read.pairs(ple, (old.ple_size, new.ple_size)) if ple in read else NO_UNITS
    head_fits, unit_fits, gains = {}, {}, {}
    for part in [part for part in old.parts if part in new.parts and f"{here}.{part}.old_gain" in read]:
        name = f"{here}.{part}"
        gains[part] = read(f"{name}.old_gain", old.hidden), read(f"{name}.new_gain", new.hidden)
        if part in ATTENTION:
            T = read(f"{name}.T", len(heads), old.heads.size, new.heads.size)
            head_fits[part] = HeadFit(T, read(f"{name}.residual", len(heads)), read(f"{name}.norms", len(heads), 2))
        else:
            scale = read(f"{name}.scale", len(ple_units if part in UNITS[1] else units))
            unit_fits[part] = UnitFit(scale, read(f"{name}.residual"), read(f"{name}.norms", 2))
    scores = read(f"{here}.head_scores", len(heads))
    return LayerPair(i, j, heads, scores, head_fits, units, unit_fits, gains, ple_units)


class _TensorReader:
    """Checked access to the tensors of an untrusted map: each is taken once, by name and expected shape."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __call__(self, name: str, *shape: int) -> Tensor:
        """Take a floating point tensor."""
        tensor = self._tensors.pop(name)
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise LoraSuiteError(
                f"a tensor of the map has the wrong shape: {name}",
                got=f"{tuple(tensor.shape)} of {tensor.dtype}", wanted=shape,
            )  # fmt: skip
        return tensor

    def pairs(self, name: str, limits: tuple[int, int]) -> Tensor:
        """Take a tensor of matched indices, old and new, (pairs, 2)."""
        return _check_pairs(self._tensors.pop(name), limits, name)

    def close(self) -> None:
        """Raise an error for tensors that were not taken."""
        if self._tensors:
            raise LoraSuiteError("the map has unexpected tensors", got=", ".join(sorted(self._tensors)[:3]))


def _check_pairs(pairs: Tensor, limits: tuple[int, int], name: str) -> Tensor:
    valid = pairs.ndim == 2 and pairs.shape[1] == 2 and pairs.dtype == torch.int64
    if not valid or bool((pairs < 0).any()) or bool((pairs >= torch.tensor(limits)).any()):
        raise LoraSuiteError(f"the map matches indices out of range: {name}", wanted=f"pairs below {limits}")
    return pairs
