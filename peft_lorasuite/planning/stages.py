"""A backbone's sizes, and what one stage of the work takes: the words in which costs are counted."""

from __future__ import annotations

from dataclasses import dataclass

from ..arch.spec import Architecture


@dataclass(frozen=True)
class Side:
    """A backbone: its architecture and the bytes of one of its weights on disk and in calibration."""

    arch: Architecture
    item: int = 2

    def weights(self, parts: tuple[str, ...]) -> int:
        """Weights of some parts of one layer."""
        shapes = [self.arch.shape(part) for part in parts if part in self.arch.parts]
        return sum(rows * columns for rows, columns in shapes)

    @property
    def layer(self) -> int:
        """Weights of one layer."""
        return self.weights(self.arch.parts)

    @property
    def module(self) -> int:
        """Weights of the largest projection of a layer."""
        return max(self.weights(tuple(site.parts)) for site in self.arch.sites)

    @property
    def table(self) -> int:
        """Weights of the embedding."""
        return self.arch.vocabulary * self.arch.hidden

    @property
    def total(self) -> int:
        """Weights of the whole checkpoint."""
        return self.arch.layers * self.layer + self.table * (1 if self.arch.tied else 2)


@dataclass(frozen=True)
class Stage:
    """One stage of the work.

    Attributes:
        name: What it does.
        read: Bytes read from the checkpoints, the map or the adapter.
        fp32: Operations in float32.
        fp64: Operations in float64.
        run: Operations in the dtype in which the models run, where that is not float32.
        assign: Steps of the Hungarian method, n^2 m for n things and m places.
        scores: Scores that the matching of units looks at.
        memory: Bytes held at its peak, without mapped files.
        mapped: Bytes of files that are mapped and gone over again and again; the system can do without keeping them.
    """

    name: str
    read: int = 0
    fp32: int = 0
    fp64: int = 0
    run: int = 0
    assign: int = 0
    scores: int = 0
    memory: int = 0
    mapped: int = 0
