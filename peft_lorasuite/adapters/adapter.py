"""`Adapter`: the updates of an adapter by layer and part, independent of fused modules and of PEFT's tensor names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..arch.layout import head_rows
from ..arch.spec import Architecture, Site
from ..errors import LoraSuiteError
from ..io.source import Source
from ..linalg.lowrank import LowRank, stack
from ..models.task import CAUSAL, HEADS, HeadPlace, LabelsLike, Task
from ..text.summary import Summarized
from .added_tokens import AddedTokens
from .class_head import ClassHead
from .experts import ExpertKey, join_experts
from .token_tables import TableUpdate

Key = tuple[int, str]
"""Layer and part."""


@dataclass(frozen=True, eq=False, repr=False)
class Adapter(Summarized):
    """An adapter, independent of how its backbone fuses modules.

    Attributes:
        arch: Architecture of its backbone.
        updates: ``(layer, part)`` -> update, with the scaling in its factors.
        config: The PEFT config that was read.
        names: ``(layer, part)`` -> names of the tensors that the update was read from.
        unused: Name of a tensor that cannot be transferred -> the reason.
        source: Folder or repository that it was read from; None for an adapter made in memory.
        kind: ``lora``, ``dora`` or ``adalora``; the result is written as the same kind.
        magnitudes: ``(layer, part)`` -> DoRA magnitudes, ``(out,)``.
        tables: ``embedding`` or ``head`` -> update of that token table.
        extras: PEFT name -> tensor that is written unchanged.
        settings: Additional entries of the written config.
        facts: Measurements while it was read, for the report.
        added: Tokens that were added to its backbone, if any.
        task: What it was trained for.
        head: Its classification head, if it has one.
        experts: ``(layer, expert, part)`` -> update of an expert, with the scaling in its factors.
        expert_names: The same -> names of the tensors that it was read from.
        others: Tensors of a backbone without a converter that are not of its linear modules, such as those of experts:
            they are not read, but PEFT loads them where the old model runs.
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
    added: AddedTokens | None = None
    task: Task = CAUSAL
    head: ClassHead | None = None
    experts: Mapping[ExpertKey, LowRank] = field(default_factory=dict)
    expert_names: Mapping[ExpertKey, tuple[str, ...]] = field(default_factory=dict)
    others: tuple[str, ...] = ()

    def _summary(self) -> tuple[str, dict[str, str]]:
        rows = {
            "from": self.origin, "type": f"{self.kind}, {self.task.kind}", "rank": str(self.rank),
            "updates": f"{len(self.updates)} of {', '.join(self.parts)}",
        }  # fmt: skip
        rows |= {"tables": ", ".join(self.tables)} if self.tables else {}
        return "Adapter", rows | ({"not transferable": f"{len(self.unused)} tensors"} if self.unused else {})

    def with_head(self, head: ClassHead, place: HeadPlace) -> Adapter:
        """Return the adapter with a classification head, at its place in the model."""
        extras = {**self.extras, **head.tensors(place)}
        settings = {**self.settings, "modules_to_save": [*self.settings.get("modules_to_save", []), *sorted(HEADS)]}
        return replace(self, extras=extras, settings=settings, head=head)

    @property
    def origin(self) -> str:
        """Folder or Hub id, for messages."""
        return self.source.name if self.source else "adapter in memory"

    @property
    def rank(self) -> int:
        """The largest rank of the updates."""
        tables = [table.rows.shape[1] for table in self.tables.values() if table.form == "lora"]
        updates = [*self.updates.values(), *self.experts.values()]
        others = [int(self.config.get("r") or 0)] if self.others else []
        return max([update.rank for update in updates] + tables + others, default=0)

    def at_one_rank(self) -> Adapter:
        """Return the adapter with the same rank in all linear modules and parameters: the largest joint rank."""
        joint = [*join_sites(self.updates, self.arch).values()]
        joint += [one for experts in join_experts(self.experts, self.arch).values() for one in experts]
        rank = max((one.rank for one in joint), default=1)
        none = torch.Generator().manual_seed(0)
        padded = {key: update.padded(rank, none) for key, update in self.updates.items()}
        return replace(self, updates=padded, settings={**self.settings, "r": rank})

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that have an update in at least one layer."""
        return tuple(part for part in self.arch.parts if any(key[1] == part for key in self.updates))

    def with_labels(self, labels: LabelsLike | None, problem_type: str | None) -> Adapter:
        """Return the adapter with other names of its labels, or another problem type, unless both are None.

        Raises:
            LoraSuiteError: If it is no classifier, or the labels do not fit its head.
        """
        if labels is None and problem_type is None:
            return self
        if self.head is None:
            raise LoraSuiteError(
                "only classifiers have labels and a problem type", where=self.origin, got=self.task.kind,
                do="leave them out",
            )  # fmt: skip
        task = self.task.with_labels(labels, problem_type, len(self.head.weight), "labels")
        return replace(self, task=task)


def separate_storage(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous tensors that share no memory, as safetensors requires; other tensors are not copied."""
    separate, seen = {}, set()
    for name, tensor in tensors.items():
        whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        unshared = whole and tensor.data_ptr() not in seen
        separate[name] = tensor if unshared else tensor.contiguous().clone()
        seen.add(separate[name].data_ptr())
    return separate


def join_sites(updates: Mapping[Key, LowRank], arch: Architecture) -> dict[tuple[int, Site], LowRank]:
    """Join the updates of a fused module's parts, with the rows in the module's order.

    Returns:
        ``(layer, site)`` -> update, of the parts' rank if they have the same A, else of the sum of their ranks.
    """
    joined = {}
    orders: dict[tuple[int, Site], Tensor | None] = {}  # layers of the same sizes share an architecture
    for layer in sorted({layer for layer, _ in updates}):
        for site in arch.sites:
            present = {part: updates[layer, part] for part in site.parts if (layer, part) in updates}
            if not present:
                continue
            own = arch.in_layer(layer)
            whole = stack(present, {part: own.shape(part)[0] for part in site.parts})
            if (id(own), site) not in orders:
                orders[id(own), site] = _order(site, own)
            order = orders[id(own), site]
            if order is not None:
                bias = None if whole.bias is None else _scatter_rows(whole.bias, order)
                whole = LowRank(whole.A, _scatter_rows(whole.B, order), bias)
            joined[layer, site] = whole
    return joined


def _order(site: Site, arch: Architecture) -> Tensor | None:
    """Return the row numbers of a site's parts, one part after another; None if the rows are in this order."""
    order = torch.cat([head_rows(site, arch)[part] for part in site.parts])
    return None if torch.equal(order, torch.arange(len(order))) else order


def _scatter_rows(rows: Tensor, order: Tensor) -> Tensor:
    scattered = torch.empty_like(rows)
    scattered[order] = rows
    return scattered
