"""Scalars that multiply the output of decoder layers, with the whole residual stream (Gemma 4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cached_property

from torch import Tensor

from ..arch.spec import Architecture
from ..errors import LoraSuiteError


class LayerScales:
    """The layer scales of a backbone; all are 1 where its family has none.

    Dividing the residual stream by the product of the scales before each layer gives a model without them: norms take
    off the factor, and what a layer adds is divided by it.

    Args:
        arch: Its architecture.
        read: Reads a tensor by its path in the model.
        where: The backbone, for error messages.
    """

    def __init__(self, arch: Architecture, read: Callable[[str], Tensor], where: str) -> None:
        self._arch, self._read, self._where = arch, read, where

    def at(self, layer: int) -> float:
        """Return the scalar that multiplies the output of a layer."""
        return self._all[layer]

    def before(self, layer: int) -> float:
        """Return the product of the scalars before a layer, by which its residual stream has been multiplied."""
        return math.prod(self._all[:layer])

    @cached_property
    def _all(self) -> list[float]:
        return list(self._read_all())

    def _read_all(self) -> Iterator[float]:
        arch = self._arch
        for layer in range(arch.layers):
            if arch.layer_scale is None:
                yield 1.0
                continue
            path = f"{arch.layer_path}.{layer}.{arch.layer_scale}"
            scale = self._read(path)
            if scale.numel() != 1 or not float(scale) > 0:
                raise LoraSuiteError(
                    "a layer scale is not one positive number", where=f"{self._where}, {path}", got=scale.tolist(),
                    do="train or fetch the backbone again",
                )  # fmt: skip
            yield float(scale)
