"""Hashes of a sample of every tensor of a backbone's text model: a few rows of matrices, vectors as a whole."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..arch.experts import EXPERT_PARTS
from ..io.checkpoint import evenly_spaced
from ..models.backbone import Backbone
from ..models.experts import belongs_to_mixture, read_expert, read_router
from ..models.quantized import quantization
from ..models.stored_names import find_stored, list_stored

TABLE_ROWS, PART_ROWS = 64, 8
"""Rows that are read of the embedding and of the head, and of each part of a projection."""
PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALLEST = 2.0**-14
"""Smallest normal float16; what is smaller is hashed as zero, because a float16 copy rounds it."""


class Sample(NamedTuple):
    """The values that are read of a tensor.

    Attributes:
        path: Name of the tensor in the loaded model.
        values: The values, or None if the tensor is not stored.
        shape: Shape of the values in an unquantized model; None where any is right.
    """

    path: str
    values: Tensor | None
    shape: tuple[int, ...] | None = None


def hash_weights(backbone: Backbone) -> dict[str, str | None]:
    """Hash a sample of the weights by kind, the same for copies in other 16- and 32-bit floating point dtypes.

    Fine-tuned models often share the embedding of their base, and differ in some kinds of tensors only.

    Returns:
        Kind (see `KINDS`) -> hash, or None if one of its tensors cannot be read as plain numbers: quantized, wrapped,
        left on disk, or not stored.
    """
    if backbone.in_memory:  # its weights can change
        return _hash_kinds(backbone)
    if backbone not in _known:
        _known[backbone] = _hash_kinds(backbone)
    return _known[backbone]


_known: WeakKeyDictionary[Backbone, dict[str, str | None]] = WeakKeyDictionary()


def _hash_kinds(backbone: Backbone) -> dict[str, str | None]:
    return {kind: _hash(samples(backbone)) for kind, samples in KINDS.items()}


def _hash(samples: Iterator[Sample]) -> str | None:
    digest = hashlib.sha256()
    for path, values, shape in samples:
        if values is None or values.dtype not in PLAIN_DTYPES or values.is_meta:
            return None
        if shape is not None and tuple(values.shape) != shape:
            return None  # packed quantized weights may be stored as bfloat16
        digest.update(f"{path} {tuple(values.shape)} ".encode() + _bits(values))
    return digest.hexdigest()


def _bits(values: Tensor) -> bytes:
    half = values.to(torch.bfloat16)
    half = torch.where(half.abs() >= SMALLEST, half, 0)
    return half.contiguous().view(torch.int16).numpy().tobytes()


def _find(backbone: Backbone, path: str) -> str | None:
    return find_stored(path, backbone.weights, backbone.arch)


def _table(backbone: Backbone, path: str) -> Iterator[Sample]:
    stored, rows = _find(backbone, f"{path}.weight"), evenly_spaced(backbone.arch.vocabulary, TABLE_ROWS)
    values = None if stored is None else backbone.weights.rows(stored, rows)
    yield Sample(path, values, (TABLE_ROWS, backbone.arch.hidden))


def _embedding(backbone: Backbone) -> Iterator[Sample]:
    """Sample the token embedding and, where positions are learned, the tables beside it."""
    arch = backbone.arch
    yield from _table(backbone, arch.embedding)
    stored, name = _find(backbone, f"{arch.embedding}.weight"), arch.embedding.rpartition(".")[2]
    if stored is not None and arch.positions == "learned":
        prefix = stored.removesuffix(f"{name}.weight")
        known = {f"{prefix}{path.rpartition('.')[2]}.weight" for path in (arch.embedding, arch.final_norm, arch.head)}
        for other in sorted(set(backbone.weights) - known):
            if re.fullmatch(rf"{re.escape(prefix)}[^.]+\.weight", other):
                yield Sample(other.removeprefix(prefix), backbone.weights.sample_rows(other, PART_ROWS))


def _head(backbone: Backbone) -> Iterator[Sample]:
    if not backbone.arch.tied:
        yield from _table(backbone, backbone.arch.head)
        yield from _vectors(backbone, backbone.arch.head, ("bias",))


def _projections(backbone: Backbone) -> Iterator[Sample]:
    arch = backbone.arch
    for layer, site in arch.modules:
        path, count = f"{arch.module(layer, site)}.weight", PART_ROWS * len(site.parts)
        stored = _find(backbone, path)
        values = None if stored is None else backbone.weights.sample_rows(stored, count)
        out, in_ = arch.module_shape(layer, site)
        width = out if site.conv1d else in_
        yield Sample(path, values, (count, width))
    for layer in range(arch.layers) if arch.experts else ():
        yield from _experts(backbone, layer)


def _experts(backbone: Backbone, layer: int) -> Iterator[Sample]:
    """Sample the router, and the first and the last expert of a layer."""
    experts = backbone.arch.experts
    if experts is None or layer in experts.dense:
        return
    if quantization(backbone.config) is not None:
        yield Sample(f"{layer}.{experts.path}", None)
        return
    yield Sample(f"{layer}.{experts.router}", read_router(backbone, layer))
    for expert in sorted({0, experts.count - 1}):
        for part in EXPERT_PARTS:
            rows = read_expert(backbone, layer, expert, part)
            yield Sample(f"{layer}.{experts.path}.{expert}.{part}", rows[evenly_spaced(len(rows), PART_ROWS)])


def _biases(backbone: Backbone) -> Iterator[Sample]:
    arch = backbone.arch
    for layer, site in arch.modules:
        if site.bias:
            path = f"{arch.module(layer, site)}.bias"
            stored = _find(backbone, path)
            yield Sample(path, None if stored is None else backbone.weights.sample_rows(stored, 1))


OWN_TENSORS = ("weight", "bias", "A_log", "dt_bias")
"""Names of the tensors of a module that are no buffers."""


def _norms(backbone: Backbone) -> Iterator[Sample]:
    """Sample all other tensors of the layers, since converters do not name every norm, and the norms around them."""
    arch = backbone.arch
    if not arch.has_converter:  # which tensors are norms is not known
        return
    sites = {(layer, site.path) for layer, site in arch.modules}
    absent = {
        layer: tuple(site.path.removesuffix("proj") for site in arch.sites if not site.is_in(layer))
        for layer in range(arch.layers)
    }
    for path, stored in sorted(list_stored(arch.layer_path, backbone.weights, arch).items()):
        layer, _, rest = path.removeprefix(f"{arch.layer_path}.").partition(".")
        module, _, kind = rest.rpartition(".")
        if belongs_to_mixture(module, arch.experts):
            continue
        known = not layer.isdigit() or int(layer) >= arch.layers or (int(layer), module) in sites
        known = known or module.startswith(absent[int(layer)])  # stored, but not read: keys of Gemma 4's last layers
        if (kind in OWN_TENSORS or rest == arch.layer_scale) and not known:
            values = backbone.weights.sample_rows(stored, PART_ROWS)
            if kind == "weight" or values.ndim == 1:  # old files of GPT-2 have a mask of that name
                yield Sample(path, values)
    for norm in (arch.embedding_norm, arch.final_norm):
        if norm is not None:
            yield from _vectors(backbone, norm, ("weight", "bias"))


def _vectors(backbone: Backbone, module: str, kinds: tuple[str, ...]) -> Iterator[Sample]:
    """Sample those of a module's vectors that it has."""
    for path in (f"{module}.{kind}" for kind in kinds):
        stored = _find(backbone, path)
        if stored is not None:
            yield Sample(path, backbone.weights.sample_rows(stored, 1))


KINDS: dict[str, Callable[[Backbone], Iterator[Sample]]] = {
    "embedding": _embedding,
    "projections": _projections,
    "norms": _norms,
    "biases": _biases,
    "head": _head,
}
"""Kinds of tensors -> their samples; a tied head has none of its own."""
EMPTY = hashlib.sha256().hexdigest()
"""Hash of a kind that the backbone has no tensors of, or that is not stored, such as the head of a base model."""
