"""The baseline that every method must beat: the same layers, cropped or padded with zeros."""

from __future__ import annotations

from torch import Tensor

from ..linalg.lowrank import LowRank
from .base import MethodInput, MethodResult
from .experts import keep_experts
from .registry import NoOptions, method


@method("copy")
def copy(inputs: MethodInput, options: NoOptions) -> MethodResult:
    """Copy every update to the layer with the same index, cropped or zero-padded to its shape."""
    del options
    arch = inputs.map.new.arch
    updates, sources, dropped = {}, {}, {}
    for (layer, part), update in inputs.adapter.updates.items():
        if layer >= arch.layers or not arch.has(layer, part):
            dropped[layer, part] = f"{arch.family} has no {part} projection in layer {layer}"
            continue
        rows, columns = arch.in_layer(layer).shape(part)
        bias = None if update.bias is None else _resize(update.bias[:, None], rows, 1)[:, 0]
        A, B = _resize(update.A, update.rank, columns), _resize(update.B, rows, update.rank)
        updates[layer, part] = LowRank(A, B, bias)
        sources[layer, part] = (layer, part)
    return MethodResult(updates, sources, dropped, experts=keep_experts(inputs))


def _resize(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """Crop a matrix, or pad it with zeros, to (rows, columns)."""
    resized = matrix.new_zeros(rows, columns)
    height, width = min(rows, matrix.shape[0]), min(columns, matrix.shape[1])
    resized[:height, :width] = matrix[:height, :width]
    return resized
