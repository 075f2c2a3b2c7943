"""The baseline that every method must beat: same names, cropped or padded with zeros."""

from __future__ import annotations

from torch import Tensor

from ..linalg.lowrank import LowRank
from .base import MethodInput, MethodResult
from .registry import NoOptions, method


@method("copy")
def copy(inputs: MethodInput, options: NoOptions) -> MethodResult:
    """Copy every update to the layer of the same number, cropped or zero-padded to its shape."""
    del options
    arch = inputs.map.new.arch
    updates, sources, dropped = {}, {}, {}
    for (layer, part), update in inputs.adapter.updates.items():
        if layer >= arch.layers or part not in arch.parts:
            dropped[layer, part] = f"{arch.family} has no {part} projection in a layer {layer}"
            continue
        rows, columns = arch.shape(part)
        bias = None if update.bias is None else _fit(update.bias[:, None], rows, 1)[:, 0]
        updates[layer, part] = LowRank(_fit(update.A, update.rank, columns), _fit(update.B, rows, update.rank), bias)
        sources[layer, part] = (layer, part)
    return MethodResult(updates, sources, dropped)


def _fit(matrix: Tensor, rows: int, columns: int) -> Tensor:
    fitted = matrix.new_zeros(rows, columns)
    height, width = min(rows, matrix.shape[0]), min(columns, matrix.shape[1])
    fitted[:height, :width] = matrix[:height, :width]
    return fitted
