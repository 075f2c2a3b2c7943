"""PEFT folder <-> `Adapter`: canonical factors per layer and part. PEFT's key names live here and in variants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..arch.layout import head_rows
from ..arch.spec import Architecture, Site
from ..io.source import Source
from ..linalg.lowrank import LowRank, stack
from .token_tables import TableUpdate

Key = tuple[int, str]
"""Layer and part."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter without the layout of its backbone.

    Attributes:
        arch: The backbone that it fits.
        updates: ``(layer, part)`` -> update, scaling folded in.
        config: The PEFT config that it was read with.
        names: ``(layer, part)`` -> names of the tensors that the update was read from.
        unused: Name of a tensor that cannot be transferred -> the reason.
        source: Where it was read from; None for one that was made in memory.
        kind: ``lora``, ``dora`` or ``adalora``: what it is written as.
        magnitudes: ``(layer, part)`` -> DoRA's magnitude of every row.
        tables: ``embedding`` or ``head`` -> update of that token table.
        extras: Tensors that are written as they are, by their PEFT name.
        settings: What the written config says beside the usual.
        facts: What reading it measured, for the report.
    """

    arch: Architecture
    updates: Mapping[Key, LowRank]
    config: Mapping[str, Any] = field(default_factory=dict)
    names: Mapping[Key, tuple[str, ...]] = field(default_factory=dict)
    unused: Mapping[str, str] = field(default_factory=dict)
    source: Source | None = None
    kind: str = "lora"
    magnitudes: Mapping[Key, Tensor] = field(default_factory=dict)
    tables: Mapping[str, TableUpdate] = field(default_factory=dict)
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def origin(self) -> str:
        """Folder or Hub id, for messages."""
        return self.source.name if self.source else "adapter in memory"

    @property
    def rank(self) -> int:
        """The largest rank of its updates."""
        tables = [table.rows.shape[1] for table in self.tables.values() if table.form == "lora"]
        return max([update.rank for update in self.updates.values()] + tables, default=0)

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that have an update in some layer."""
        return tuple(part for part in self.arch.parts if any(key[1] == part for key in self.updates))


def separate_storage(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous tensors that share no memory, as safetensors wants them; copies only what does."""
    found, seen = {}, set()
    for name, tensor in tensors.items():
        whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        alone = whole and tensor.data_ptr() not in seen
        found[name] = tensor if alone else tensor.contiguous().clone()
        seen.add(found[name].data_ptr())
    return found


def by_site(adapter: Adapter) -> dict[tuple[int, Site], LowRank]:
    """Join the parts of fused modules, rows in the module's own order."""
    return join_sites(adapter.updates, adapter.arch)


def join_sites(updates: Mapping[Key, LowRank], arch: Architecture) -> dict[tuple[int, Site], LowRank]:
    """Join updates per part into updates per module: rank r where all share their A, the sum of ranks otherwise."""
    joined = {}
    for layer in sorted({layer for layer, _ in updates}):
        for site in arch.sites:
            present = {part: updates[layer, part] for part in site.parts if (layer, part) in updates}
            if not present:
                continue
            whole = stack(present, {part: arch.shape(part)[0] for part in site.parts})
            order = torch.cat([head_rows(site, arch)[part] for part in site.parts])
            joined[layer, site] = LowRank(
                whole.A, _placed(whole.B, order), None if whole.bias is None else _placed(whole.bias, order)
            )
    return joined


def _placed(rows: Tensor, order: Tensor) -> Tensor:
    placed = torch.empty_like(rows)
    placed[order] = rows
    return placed
