"""What a map and an upgrade will cost, from two configs alone: shapes, bytes, operations, memory and seconds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..arch.spec import Architecture
from ..errors import LoraSuiteError
from ..io.source import Source, read_json
from ..mapping.upgrade_map import MapOptions
from ..methods import registry as methods
from ..models.backbone import Backbone
from .counts import MATCHED, Costs, shared_at_most
from .rates import GB, Rates
from .stages import Side, Stage


@dataclass(frozen=True)
class Plan:
    """What building a map and applying it will cost.

    Attributes:
        names: Old and new backbone as they were given.
        costs: The shapes and the counts.
        rates: The machine.
        rank: Rank of the adapter that the upgrade is counted for.
        stages: The stages of the map, in order.
    """

    names: tuple[str, str]
    costs: Costs
    rates: Rates
    rank: int
    stages: tuple[Stage, ...]

    @property
    def read(self) -> int:
        """Bytes that the map reads."""
        return sum(stage.read for stage in self.stages)

    @property
    def seconds(self) -> float:
        """Seconds that the map takes."""
        return sum(self.rates.seconds(stage) for stage in self.stages)

    @property
    def memory(self) -> int:
        """Bytes at the peak of the map, without mapped files and without the interpreter and its libraries."""
        return max(stage.memory for stage in self.stages)

    @property
    def mapped(self) -> int:
        """Bytes of mapped files at most, which the system keeps in memory where there is room."""
        return max(stage.mapped for stage in self.stages)

    @property
    def bound(self) -> int:
        """Bytes that the map is meant to stay below.

        Four times the larger model's layer in float32, both embeddings and 1 GB; where the models run for the
        calibration and are held, the larger one in its own dtype besides.
        """
        sides = self.costs.old, self.costs.new
        held = self.costs.options.layer_map == "cka" and not self.costs.low_memory
        runs = max(side.total * side.item for side in sides) if held else 0
        tables = sum(side.table * side.item for side in sides)
        return 16 * max(side.layer for side in sides) + tables + 10**9 + runs

    @property
    def upgrade(self) -> Stage:
        """One adapter, with a ready map."""
        return self.costs.upgrade(self.rank)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        told = [{**vars(stage), "seconds": round(self.rates.seconds(stage), 3)} for stage in self.stages]
        upgrade = {**vars(self.upgrade), "seconds": round(self.rates.seconds(self.upgrade), 3)}
        totals = {"read": self.read, "seconds": round(self.seconds, 3), "memory": self.memory}
        totals |= {"mapped": self.mapped, "bound": self.bound}
        sizes = {"old": self.costs.old.arch.sizes(), "new": self.costs.new.arch.sizes(), "map": self.costs.kept}
        return {**sizes, **totals, "stages": told, "upgrade": upgrade, "rates": vars(self.rates), "needs": needs(self)}


def plan(
    old: Any,
    new: Any,
    options: MapOptions | None = None,
    *,
    rates: Rates | None = None,
    rank: int = 16,
    shared: int | None = None,
    dtype: torch.dtype | str = "auto",
    low_memory: bool = False,
    token: str | bool | None = None,
    cache_dir: str | None = None,
) -> Plan:
    """Count what a map of two backbones will cost; no weight is read or fetched.

    Args:
        old: Old backbone: folder, Hub id (``owner/name`` or ``owner/name@revision``), config file, or a `Backbone`.
        new: New backbone, likewise.
        options: How the map is to be built.
        rates: The machine's speed; `measure_rates` measures it.
        rank: Rank of the adapter that the upgrade is counted for.
        dtype: Of the calibration runs; ``"auto"`` is the checkpoints' own.
        low_memory: Whether the layers stay on disk meanwhile.
        shared: Tokens that the tokenizers share; without it, as many as the smaller vocabulary has.
        token: Hub token.
        cache_dir: Hub cache.

    Raises:
        LoraSuiteError: For a config that is missing, broken, or of an unknown model type, and for a rank that is none.
    """
    options = options or MapOptions()
    backbones = [_opened(name, token, cache_dir) for name in (old, new)]
    left, right = (Side(backbone.arch, _item(backbone.config)) for backbone in backbones)
    if rank < 1:
        raise LoraSuiteError("the rank is not positive", got=rank)
    item = None if dtype == "auto" else _itemsize(dtype)
    costs = Costs(left, right, options, shared_at_most(left.arch, right.arch, shared), item, low_memory)
    names = backbones[0].name, backbones[1].name
    return Plan(names, costs, rates or Rates(), rank, tuple(costs.stages()))


@dataclass(frozen=True)
class _ConfigFile(Source):
    """A config file of any name, taken for a backbone's config.json."""

    def read_json(self, filename: str, *, do: str | None = None) -> dict[str, Any]:
        return read_json(Path(self.name), where=self.name)

    def place_of(self, filename: str) -> str:
        return self.name


def _opened(name: Any, token: str | bool | None, cache_dir: str | None) -> Backbone:
    place = name.name if isinstance(name, Backbone) else name
    if isinstance(place, (str, Path)) and Path(place).is_file():
        return Backbone(_ConfigFile(str(place), "backbone"))
    return Backbone.open(name, token=token, cache_dir=cache_dir)


def _item(config: Any) -> int:
    """Bytes of a weight; configs that name no dtype are taken for 16 bits, as nearly all checkpoints are."""
    return _itemsize(getattr(config, "dtype", None))


def _itemsize(dtype: Any) -> int:
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    return dtype.itemsize if isinstance(dtype, torch.dtype) else 2


def needs(planned: Plan) -> dict[str, str]:
    """Say of every method what it needs beside the adapter."""
    sides = planned.costs.old, planned.costs.new
    sizes = " and ".join(f"{side.total * side.item / GB:.3g} GB" for side in sides)
    told = {}
    for name in methods.names():
        method = methods.find(name)
        wants = ["the map"]
        if method.section is not None:
            wants.append(
                f"its section {method.section.name!r} in the map, built on demand from both backbones' weights"
            )
        if method.needs_backbones:
            wants.append(f"both backbones loaded ({sizes})")
        told[name] = ", ".join(wants)
    return told


def text(planned: Plan) -> str:
    """Return a plan as a table for people."""
    costs, rates = planned.costs, planned.rates
    shapes = zip(("old", "new"), planned.names, (costs.old, costs.new), strict=True)
    lines = [f"{role} {name}: {_shape(side)}" for role, name, side in shapes]
    tokens = f"at most {costs.shared} shared tokens, {costs.options.tokens} tokens of text kept"
    lines += [f"{costs.layers} layers matched, {tokens}", "", *_table(planned), ""]
    total = f"map: {_time(planned.seconds)}, {_size(planned.read)} read, {_size(costs.kept)} on disk"
    lines.append(f"{total}, {_size(planned.memory)} of memory at its peak (bound: {_size(planned.bound)})")
    lines += [f"  the models run from mapped files: {_size(planned.mapped)} more, if there is room"] * bool(
        planned.mapped
    )
    lines += [f"  {line}" for line in _notes(rates)]
    return "\n".join(
        [*lines, "", "beside the adapter:", *(f"  {name}: {want}" for name, want in needs(planned).items())]
    )


def _table(planned: Plan) -> list[str]:
    """Lay out the stages; operations in 10^9."""
    rows = [["stage", "read", "float32", "float64", "models", "memory", "time"]]
    for stage in (*planned.stages, planned.upgrade):
        work = [f"{amount / GB:,.1f}" if amount else "-" for amount in (stage.fp32, stage.fp64, stage.run)]
        rows.append([stage.name, _size(stage.read), *work, _size(stage.memory), _time(planned.rates.seconds(stage))])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.rjust(width) if column else cell.ljust(width)
                  for column, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]  # fmt: skip


def _notes(rates: Rates) -> list[str]:
    speeds = f"{rates.fp32:.3g} in float32, {rates.fp64:.3g} in float64, {rates.bf16:.3g} in bfloat16"
    return [
        "float32, float64, models (in their own dtype, bfloat16 as a rule): 10^9 operations",
        f"at {rates.read:.3g} GB/s from disk, 10^9 operations a second: {speeds}, {rates.assign:.3g} of assignment, "
        f"{rates.scores:.3g} of matching",
        "memory: without mapped files and without the libraries themselves (about 0.5 GB)",
        f"units: {MATCHED:.0%} matched at the first look, as measured on a real pair; nearer backbones take less",
    ]


def _shape(side: Side) -> str:
    arch: Architecture = side.arch
    heads = f"{arch.heads.query}/{arch.heads.key_value} heads of {arch.heads.size}"
    return (
        f"{arch.family}, {arch.layers} layers, hidden size {arch.hidden}, {heads}, {arch.intermediate} units, "
        f"{arch.vocabulary} tokens; {side.total / GB:.2f} B weights, {_size(side.total * side.item)}"
    )


def _size(count: int) -> str:
    return f"{count / GB:.2f} GB" if count >= GB / 10 else f"{count / 1e6:.1f} MB" if count else "-"


def _time(seconds: float) -> str:
    return (
        f"{seconds:.2f} s"
        if seconds < 120
        else f"{seconds / 60:.1f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
