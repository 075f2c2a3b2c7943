"""From the tensors of a LoRA, DoRA or AdaLoRA to an `Adapter`, with a reason for each tensor that is not used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..arch.layout import split
from ..arch.spec import Architecture, Site
from ..errors import LoraSuiteError
from ..io.source import Source
from ..linalg.lowrank import LowRank
from ..models.backbone import Backbone
from .adapter import Adapter
from .class_head import ClassHead, adapter_task, is_head, read_head
from .experts import INNER, ExpertReader, find_expert_module
from .key_names import FOREIGN, KeyName, group_by_module, parse_names
from .modules import Paths, check_rank, check_shapes, parameter_paths, read_update, scaling, split_parts
from .peft_format import (
    COPIED,
    COPY,
    LINEAR_ENDINGS,
    PRUNED,
    TRAINED_BIAS,
    UNUSED_TABLE_ENDINGS,
    WEIGHTS,
    adapter_kind,
    skip_reason,
)
from .token_tables import DELTA, TableUpdate, find_table, read_table, tied_copies


@dataclass
class ParsedAdapter:
    """The tensors of an adapter, parsed module by module.

    Attributes:
        tensors: Saved name -> tensor.
        config: The adapter's PEFT config.
        arch: Architecture of the backbone.
        old: The backbone, if it is given.
        where: Place for error messages.
        updates: As in `Adapter`, like ``names``, ``unused``, ``magnitudes``, ``tables`` and ``head``.
        paths: Module in the backbone -> the paths that patterns in the config can match.
    """

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    arch: Architecture
    old: Backbone | None
    where: str
    updates: dict[tuple[int, str], LowRank] = field(default_factory=dict)
    names: dict[tuple[int, str], tuple[str, ...]] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)
    magnitudes: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    tables: dict[str, TableUpdate] = field(default_factory=dict)
    paths: dict[str, Paths] = field(default_factory=dict)
    head: ClassHead | None = None
    others: list[str] = field(default_factory=list)
    experts: ExpertReader = field(init=False)

    def __post_init__(self) -> None:
        self.experts = ExpertReader(self.config, self.arch, self.where)

    def parse(self) -> ParsedAdapter:
        """Parse every module, by the names that `key_names` resolves; returns itself."""
        if not self.tensors:
            raise LoraSuiteError("the adapter has no tensors", where=self.where, do="fetch it again")
        parsed = parse_names(self.tensors, self.arch)
        groups, unused = group_by_module(parsed)
        self.unused |= {name: self._same(name, groups, parsed[name]) or why for name, why in unused.items()}
        for name in tied_copies(groups, self.tensors, self.arch):
            self._skip([name], COPY)
            groups[parsed[name].module].pop(parsed[name].ending)
        self.paths = {key.module: key.paths for key in parsed.values() if not key.reason}
        for path, owned in groups.items():
            expert = find_expert_module(path, self.arch) if adapter_kind(self.config) == "lora" else None
            if expert is None:
                self._parse_module(path, owned)
            else:
                used = {ending: self.tensors[name] for ending, name in owned.items()}
                both = expert.inner or f"{path}.{INNER}" in groups
                self.experts.read(expert, used, tuple(owned.values()), self.paths[path], both=both)
        return self

    def _same(self, name: str, groups: Mapping[str, Mapping[str, str]], key: KeyName) -> str:
        """Return that a tensor is a copy of the one that is used: PEFT saves trained modules twice in some layouts."""
        used = groups.get(key.module, {}).get(key.ending)
        if used is None or key.reason:
            return ""
        one, other = self.tensors[name], self.tensors[used]
        return f"{COPIED}{used}" if one.dtype == other.dtype and torch.equal(one, other) else ""

    def _parse_module(self, path: str, owned: dict[str, str]) -> None:
        """Parse a module; ``owned`` are the saved names of its tensors by ending."""
        kind, place, table = adapter_kind(self.config), self.arch.find(path), find_table(path, self.arch)
        if place is not None and set(owned) & {*LINEAR_ENDINGS[kind]}:
            others = {ending: owned.pop(ending) for ending in list(owned) if ending not in LINEAR_ENDINGS[kind]}
            why = f"a {kind} has no such tensor in a linear module, and the config describes a {kind}"
            self._skip(others.values(), COPY if others and self._is_base(path, others) else why)
            self._parse_linear(path, owned, *place)
        elif (
            table is not None
            and (kind == "lora" or set(owned) & {"weight", DELTA})
            and owned.keys() - {*UNUSED_TABLE_ENDINGS}
        ):
            kept = "bias" if table == "head" and "weight" in owned else ""
            left_out = {end: why for end, why in UNUSED_TABLE_ENDINGS.items() if end in owned and end != kept}
            self.unused |= {owned.pop(end): why for end, why in left_out.items()}
            self._parse_table(path, owned, table)
        elif table is not None and kind != "lora":
            self._skip(owned.values(), f"a {kind} of a token table is not transferred; train it as LoRA instead")
        elif is_head(path) and self.head is None:
            used = {ending: self.tensors[name] for ending, name in owned.items()}
            self.head = read_head(used, tuple(owned.values()), self.arch, where=f"{self.where}, {path}")
        elif not self.arch.has_converter:
            self.others += owned.values()
        else:
            self._skip(owned.values(), COPY if self._is_base(path, owned) else skip_reason(owned, self.arch.family))

    def _is_base(self, path: str, owned: Mapping[str, str]) -> bool:
        """Whether tensors are the backbone's own, as in a state dict that was saved as a whole."""
        if self.old is None or not set(owned) <= {"weight", "bias", "base_layer.weight"}:
            return False
        for ending, name in owned.items():
            try:
                own = self.old.tensor(f"{path}.{ending.removeprefix('base_layer.')}")
            except LoraSuiteError:  # it has none of this name
                return False
            saved = self.tensors[name]
            if own.shape != saved.shape or not torch.equal(own.to(saved.dtype), saved):
                return False
        return True

    def _parse_linear(self, path: str, owned: Mapping[str, str], layer: int, site: Site) -> None:
        taken = self.names.get((layer, site.parts[0]))
        if taken is not None:
            return self._skip(owned.values(), f"it is for the same module as {taken[0]}")
        used = {ending: self.tensors[name] for ending, name in owned.items()}
        check_shapes(used, adapter_kind(self.config), self.arch, layer, site, self.where)
        paths = parameter_paths(self.config, self.paths[path])
        if "lora_A.weight" in used:
            check_rank(self.config, paths, len(used["lora_A.weight"]), self.where)
        update = read_update(used, self.config, paths, self.old, self.arch, (layer, site))
        if update is None:
            return self._skip(owned.values(), PRUNED)
        if update.bias is None and not set(used) - {*TRAINED_BIAS}:
            return self._skip(owned.values(), COPY)
        for part, piece in split_parts(update, site, self.arch.in_layer(layer)).items():
            self.updates[layer, part], self.names[layer, part] = piece, tuple(owned.values())
        if "lora_magnitude_vector" in used:
            rows = split(used["lora_magnitude_vector"].float().flatten(), site, self.arch.in_layer(layer))
            self.magnitudes |= {(layer, part): values for part, values in rows.items()}
        return None

    def _parse_table(self, path: str, owned: Mapping[str, str], table: str) -> None:
        if table in self.tables:
            return self._skip(owned.values(), f"it is for the same module as {self.tables[table].names[0]}")
        used = {ending: self.tensors[name] for ending, name in owned.items()}
        self.tables[table] = read_table(
            table, used, tuple(owned.values()), self.config, lambda rank: self._table_scaling(path, rank),
            self.arch, self.old, where=f"{self.where}, {path}",
        )  # fmt: skip
        return None

    def _table_scaling(self, path: str, rank: int) -> float:
        check_rank(self.config, self.paths[path], rank, self.where)
        return scaling(self.config, self.paths[path], rank)

    def _skip(self, names: Iterable[str], why: str) -> None:
        self.unused |= dict.fromkeys(names, why)


def from_tensors(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], arch: Architecture, *, source: Source,
    old: Backbone | None = None,
) -> Adapter:  # fmt: skip
    """Return the `Adapter` of the tensors of a LoRA, DoRA or AdaLoRA.

    Args:
        tensors: Saved name -> tensor.
        config: The adapter's PEFT config.
        arch: Architecture of the backbone.
        source: Folder or repository of the adapter.
        old: The backbone; needed for trained biases and token tables.

    Raises:
        LoraSuiteError: If there are no tensors, none belongs to the backbone, or one is malformed.
    """
    where = f"{source.name}/{WEIGHTS}"
    parsed = ParsedAdapter(tensors, config, arch, old, where).parse()
    if not (parsed.updates or parsed.tables or parsed.head or parsed.experts.updates or parsed.others):
        raise _no_update_error(parsed)
    return Adapter(
        arch,
        parsed.updates,
        config,
        parsed.names,
        parsed.unused,
        source,
        adapter_kind(config),
        parsed.magnitudes,
        parsed.tables,
        task=adapter_task(config, parsed.head, where=where),
        head=parsed.head,
        experts=parsed.experts.updates,
        expert_names=parsed.experts.names,
        others=tuple(parsed.others),
    )


def _no_update_error(parsed: ParsedAdapter) -> LoraSuiteError:
    """Build the error for an adapter without an update of the backbone."""
    reasons = set(parsed.unused.values())
    if all(reason.startswith(FOREIGN) for reason in reasons):
        return LoraSuiteError(
            "the adapter changes nothing in the text model", where=parsed.where, got=f"{sorted(reasons)[0]}",
            do="train an adapter of the text model: other towers are not transferred",
        )  # fmt: skip
    return LoraSuiteError(
        f"none of the adapter's tensors belongs to a module of the old backbone ({parsed.arch.family})",
        where=parsed.where, got=", ".join(list(parsed.tensors)[:3]),
        do="pass the backbone that it was trained on (--from, source_model=)",
    )  # fmt: skip
