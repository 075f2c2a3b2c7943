"""What maps and upgrades cost, estimated from two configs: bytes, memory and a rough time."""

from __future__ import annotations

import os
import tempfile
import timeit
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..arch.spec import ATTENTION, Architecture
from ..errors import LoraSuiteError
from ..io.json_file import read_json
from ..io.source import Source
from ..linalg.similarity import SKETCH_SIZE
from ..mapping.hidden import FIT_TOKENS
from ..mapping.options import MapOptions
from ..methods import registry
from ..models.activations import BATCH_TOKENS, BUDGET
from ..models.backbone import Backbone
from ..models.dtype import choose_dtype

GB = 10**9
LIBRARIES, TOKEN = 350 * 10**6, 1000
"""Bytes of a process that has imported everything, and of a token in its tokenizers and vocabularies."""
PASSES = 3
"""Time of matching two layers, as a multiple of its matrix products: sorting and norms take the rest."""


class Rates(NamedTuple):
    """Speed of a machine, by default of two server cores: GB read per second, and GFLOP/s of float32 products."""

    read: float = 0.4
    compute: float = 180.0


class Stage(NamedTuple):
    """One step: bytes read, floating-point operations, and bytes of memory at its peak."""

    name: str
    read: int
    operations: int
    memory: int

    def seconds(self, rates: Rates) -> float:
        """Return how long it takes, roughly."""
        return (self.read / rates.read + self.operations / rates.compute) / GB


class Side(NamedTuple):
    """A backbone: its name and architecture, and the bytes of a weight on disk and in the running model."""

    name: str
    arch: Architecture
    stored: int
    running: int

    @property
    def layer(self) -> int:
        """Weights of one layer."""
        return sum(rows * columns for rows, columns in map(self.arch.shape, self.arch.parts))

    @property
    def table(self) -> int:
        """Weights of the embedding."""
        return self.arch.vocabulary * self.arch.hidden

    def model(self, low_memory: bool = False) -> int:
        """Return the bytes of the running model: its weights, one layer in float32, activations of a batch."""
        weights = self.table if low_memory else self.arch.parameter_count()
        batch = BATCH_TOKENS * (3 * self.arch.intermediate + 6 * self.arch.hidden)
        return (weights + batch) * self.running + 4 * self.layer


@dataclass(frozen=True)
class Plan:
    """Estimated costs of a map and of an upgrade. Memory is the peak, at most, with the libraries and whole models.

    Attributes:
        old: Old backbone.
        new: New backbone.
        options: How the map is built.
        rank: Rank of the adapter.
        low_memory: Whether the layers stay on disk during the calibration.
        rates: Speed of the machine.
    """

    old: Side
    new: Side
    options: MapOptions
    rank: int
    low_memory: bool
    rates: Rates

    @property
    def map_bytes(self) -> int:
        """Bytes of the map on disk: the hidden map, and of each pair of layers the heads, units and gains."""
        old, new = self.old.arch, self.new.arch
        heads = min(old.heads.query, new.heads.query) * (16 * old.heads.size * new.heads.size + 68)
        layer = heads + 28 * (min(old.intermediate, new.intermediate) + old.hidden + new.hidden)
        return 4 * (old.hidden * new.hidden + old.layers * new.layers) + min(old.layers, new.layers) * layer

    @property
    def stages(self) -> list[Stage]:
        """Stages of the map."""
        return [self._calibration()] * (self.options.layer_map == "cka") + [self._weights()]

    @property
    def map(self) -> Stage:
        """The whole map."""
        _, read, operations, memory = zip(*self.stages, strict=True)
        return Stage("map", sum(read), sum(operations), max(memory))

    @property
    def upgrade(self) -> Stage:
        """An upgrade by weights, with a ready map, of an adapter on every linear module."""
        sides = self.old.arch, self.new.arch
        old, new = (4 * self.rank * arch.layers * sum(map(sum, map(arch.shape, arch.parts))) for arch in sides)
        operations = 4 * self.rank * sum(arch.parameter_count() for arch in sides)
        return Stage("upgrade by weights", self.map_bytes + old, operations, self._base + 2 * (old + new))

    @property
    def run(self) -> Stage:
        """Running both backbones over prompts, one after the other, as `transplant` and `distill` do."""
        old, new = self.old, self.new
        counts = old.arch.parameter_count(), new.arch.parameter_count()
        operations = 2 * 128 * 100 * (2 * counts[0] + counts[1])  # 128 prompts and answers, the old backbone twice
        models = max(old.model(), new.model() + old.table * old.running)  # the old head is kept
        targets = 4 * 2000 * min(new.arch.vocabulary, 16384)  # positions, and candidate tokens of all together
        memory = self._base + models + targets + 4 * BATCH_TOKENS * max(old.arch.vocabulary, new.arch.vocabulary)
        return Stage("running both backbones", counts[0] * old.stored + counts[1] * new.stored, operations, memory)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; the totals are those of the map."""
        rows = *self.stages, self.upgrade, self.run, self.map
        *stages, whole = ({**row._asdict(), "seconds": round(row.seconds(self.rates), 3)} for row in rows)
        sizes = {"old": self.old.arch.sizes(), "new": self.new.arch.sizes(), "map_bytes": self.map_bytes}
        return {**sizes, **whole, "stages": stages, "rates": self.rates._asdict()}

    def __str__(self) -> str:
        lines, matched = [], min(self.old.arch.layers, self.new.arch.layers)
        for side in (self.old, self.new):
            arch, count = side.arch, side.arch.parameter_count() / GB
            shape = f"{arch.family}, {arch.layers} layers, hidden size {arch.hidden}"
            lines.append(f"{side.name}: {shape}, {count:.2f} B weights, {count * side.stored:.2f} GB")
        lines += [f"{matched} layers matched", "", f"{'':<22}{'read':>13}{'max. memory':>13}{'time':>11}"]
        for row in (*self.stages, self.map, self.upgrade, self.run):
            seconds = timedelta(seconds=round(row.seconds(self.rates)))
            lines.append(f"{row.name:<22}{row.read / GB:>10.2f} GB{row.memory / GB:>10.2f} GB{seconds!s:>11}")
        rates = f"{self.rates.read:.2f} GB/s and {self.rates.compute:.0f} GFLOP/s"
        lines += ["", f"map on disk: {self.map_bytes / GB:.3f} GB; rough times at {rates}", "beside the adapter:"]
        for method in map(registry.find, registry.names()):
            section = f", its section {method.section.name!r}" if method.section else ""
            lines.append(f"  {method.name}: the map{section}{', both backbones' * method.needs_backbones}")
        return "\n".join(lines)

    @property
    def _base(self) -> int:
        """Bytes held all the time: the libraries, the tokenizers, and the map with the inverse of the hidden map."""
        old, new = self.old.arch, self.new.arch
        return LIBRARIES + TOKEN * (old.vocabulary + new.vocabulary) + self.map_bytes + 4 * old.hidden * new.hidden

    def _calibration(self) -> Stage:
        """Run both backbones, one after the other, over 1.3 times the tokens: not all end at one character in both."""
        sides, kept, tokens = (self.old, self.new), self.options.tokens, round(1.3 * self.options.tokens)
        batches = -(-tokens // BATCH_TOKENS) if self.low_memory else 1  # each of them reads the layers again
        read = sum((side.table + batches * side.arch.layers * side.layer) * side.stored for side in sides)
        outputs = 2 * sum(min(side.arch.layers * kept * side.arch.hidden * side.running, BUDGET) for side in sides)
        memory = self._base + outputs + max(side.model(self.low_memory) for side in sides)
        return Stage("calibration", read, 2 * tokens * sum(side.arch.layers * side.layer for side in sides), memory)

    def _weights(self) -> Stage:
        """Fit the hidden map, then match the heads and units of one pair of layers at a time."""
        old, new, D, E = self.old.arch, self.new.arch, self.old.arch.hidden, self.new.arch.hidden
        shared, width = min(old.vocabulary, new.vocabulary, max(FIT_TOKENS, 8 * D)), min(E, SKETCH_SIZE)
        attention = sum(rows * columns for rows, columns in map(old.shape, set(ATTENTION) & set(old.parts)))
        heads = old.heads.query * new.heads.query + old.heads.key_value * new.heads.key_value
        moved, units = E * attention + width * (self.old.layer - attention), old.intermediate * new.intermediate
        products = 2 * (moved + units * width) + 4 * E * heads * old.heads.size * new.heads.size
        layers, fit = min(old.layers, new.layers), 6 * shared * D * (D + E) * (self.options.hidden_map != "identity")
        read = sum((side.table + layers * side.layer) * side.stored for side in (self.old, self.new))
        embeddings = 4 * shared * (D + 4 * E) + 8 * min(shared, 8192) * (D + E) + 16 * D * (2 * D + E)
        memory = self._base + max(embeddings, 16 * max(self.old.layer, self.new.layer) + 8 * units)
        return Stage("weights", read, fit + PASSES * layers * products, memory)


def plan(
    old: Any, new: Any, options: MapOptions | None = None, *, rates: Rates | None = None, rank: int = 16,
    dtype: torch.dtype | str = "auto", low_memory: bool = False, token: str | bool | None = None,
    cache_dir: str | None = None,
) -> Plan:  # fmt: skip
    """Estimate what a map of two backbones costs; only their configs are read.

    Args:
        old: Old backbone: folder, Hub id (``owner/name`` or ``owner/name@revision``), config file, or a `Backbone`.
        new: New backbone, likewise.
        options: How the map is to be built.
        rates: The machine's speed; `measure_rates` measures it.
        rank: Rank of the adapter to be upgraded.
        dtype: In which the backbones run, as in `UpgradeMap.build`.
        low_memory: Whether the layers stay on disk during the calibration.
        token: Hub token.
        cache_dir: Hub cache.

    Raises:
        LoraSuiteError: For a config that is missing, malformed or of an unknown model type, and for a rank below 1.
    """
    if rank < 1:
        raise LoraSuiteError("the rank must be positive", got=rank)
    left, right = (_known_side(Backbone.open(one, token=token, cache_dir=cache_dir), dtype) for one in (old, new))
    return Plan(left, right, options or MapOptions(), rank, low_memory, rates or Rates())


class _ConfigFile(Source):
    """A config file of any name, in place of a backbone's config.json."""

    def read_json(self, filename: str, **_: Any) -> dict[str, Any]:
        return read_json(Path(self.name), where=self.name)

    def full_name(self, filename: str) -> str:
        return self.name


def _known_side(backbone: Backbone, dtype: torch.dtype | str) -> Side:
    side = _side(backbone, dtype)
    if not side.arch.has_converter:
        raise LoraSuiteError(
            f"no converter for model type {side.arch.family!r}, which describes the layers that a map depends on",
            where=side.name, do="run the upgrade itself: such a pair needs no map of the weights",
        )  # fmt: skip
    return side


def _side(backbone: Backbone, dtype: torch.dtype | str) -> Side:
    """Read a config; without a dtype it is taken for that of a 16-bit checkpoint."""
    dtype, device_map = backbone.dtype if dtype == "auto" else dtype, backbone.device_map
    if not backbone.in_memory and Path(backbone.name).is_file():
        backbone = Backbone(_ConfigFile(backbone.name, "backbone"))
    arch, stored = backbone.arch, getattr(backbone.config.get_text_config(), "dtype", None)
    stored = stored if isinstance(stored, torch.dtype) else torch.bfloat16
    running = choose_dtype(dtype, stored, parameters=arch.parameter_count(), device_map=device_map).dtype
    return Side(backbone.name, arch, stored.itemsize, running.itemsize)


def measure_rates() -> Rates:
    """Measure matrix products and, if there is space for it, the reading of a fresh file; takes about a second."""
    M, size, read = torch.ones(1024, 1024), 2**26, Rates().read * GB
    compute = 2 * len(M) ** 3 / min(timeit.repeat(lambda: M @ M, number=1))
    with suppress(OSError), tempfile.TemporaryFile(buffering=0) as file:
        if file.write(os.urandom(size)) < size:
            raise OSError("the disk is full")
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # out of the page cache
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        read = size / timeit.timeit(file.read, number=1)
    return Rates(read / GB, compute / GB)
