"""PEFT folder <-> `Adapter`: canonical factors per layer and part. PEFT's key names live here and in variants."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..arch.layout import head_rows, join
from ..arch.spec import Architecture, Site
from ..errors import LoraSuiteError
from ..io.checkpoint import no_safetensors, open_safetensors, read_all
from ..io.source import Source
from ..linalg.lowrank import LowRank, stack
from ..models.backbone import Backbone
from . import adalora
from .parsing import Found
from .peft_format import CONFIG, PREFIX, READ, WEIGHTS, check, kind_of, needs_backbones
from .token_tables import TableUpdate, needs_old

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
        unused: Name of a tensor that cannot be carried -> the reason.
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


def read_config(source: Source) -> dict[str, Any]:
    """Read an adapter's config, refusing what is no adapter."""
    config = source.read_json(CONFIG, do="name the folder or Hub repository of a PEFT adapter")
    if not config.get("peft_type"):
        raise LoraSuiteError(
            "the config names no peft_type", where=f"{source.name}/{CONFIG}", do="is it a PEFT adapter?"
        )
    if not isinstance(config.get("revision") or "", str):
        raise LoraSuiteError(
            "the revision of the base model is no text", where=f"{source.name}/{CONFIG}", got=repr(config["revision"]),
            do="mend the config",
        )  # fmt: skip
    return config


def reads_backbones(source: Source) -> bool:
    """Whether carrying an adapter needs both backbones; refuses at once what is not carried at all."""
    config = read_config(source)
    check(config, source.name)
    path = source.fetch(WEIGHTS)
    if path is None:
        raise no_safetensors(source, WEIGHTS)
    return needs_backbones(config, open_safetensors(path, where=f"{source.name}/{WEIGHTS}").keys())


def read(source: Source, arch: Architecture, *, old: Backbone | None = None, rank: int | None = None) -> Adapter:
    """Read an adapter of a backbone.

    Args:
        source: Its folder or repository.
        arch: Its backbone's shape.
        old: The backbone itself: for trained biases and tables, and for kinds that are converted to LoRA first.
        rank: Rank of such a conversion.

    Raises:
        LoraSuiteError: When a file is missing or broken, a shape does not fit the backbone, or the adapter is of a
            kind that is not carried.
    """
    config = read_config(source)
    check(config, source.name)
    path = source.fetch(WEIGHTS)
    if path is None:
        raise no_safetensors(source, WEIGHTS)
    where = f"{source.name}/{WEIGHTS}"
    tensors = read_all(path, where=where)
    if config["peft_type"] not in READ:
        from .conversion import converted

        if old is None:
            raise needs_old(f"the adapter is a {config['peft_type']} and is made a LoRA first")
        return converted(source, config, tensors, old, rank, from_tensors)
    return from_tensors(tensors, config, arch, source=source, old=old)


def from_tensors(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], arch: Architecture, *, source: Source,
    old: Backbone | None = None,
) -> Adapter:  # fmt: skip
    """Make an adapter of the tensors of a LoRA, DoRA or AdaLoRA."""
    where = f"{source.name}/{WEIGHTS}"
    found = Found(tensors, config, arch, old, where).read()
    if not found.updates and not found.tables:
        raise LoraSuiteError(
            f"no tensor of the adapter belongs to a layer of the old backbone ({arch.family})",
            where=where,
            got=", ".join(list(tensors)[:3]),
            do="name the backbone that it was trained on (--from, source_model=)",
        )
    return Adapter(
        arch, found.updates, config, found.names, found.unused, source, kind_of(config), found.magnitudes, found.tables
    )


def state_dict(adapter: Adapter) -> dict[str, Tensor]:
    """Return the tensors of a PEFT adapter; every site's parts must be there (see upgrade)."""
    tensors = dict(adapter.extras)
    sites = by_site(adapter)
    biased = any(update.bias is not None for update in sites.values())
    for (layer, site), update in sites.items():
        module = f"{PREFIX}{adapter.arch.layer_path}.{layer}.{site.path}"
        if adapter.kind == "adalora":
            tensors |= {f"{module}.{end}": value for end, value in adalora.unfolded(update, adapter.config).items()}
            continue
        tensors[f"{module}.lora_A.weight"] = update.A
        tensors[f"{module}.lora_B.weight"] = update.B
        if biased:
            tensors[f"{module}.lora_B.bias"] = update.B.new_zeros(len(update.B)) if update.bias is None else update.bias
        if adapter.kind == "dora":
            rows = {part: adapter.magnitudes[layer, part] for part in site.parts}
            tensors[f"{module}.lora_magnitude_vector"] = join(rows, site, adapter.arch)
    return apart(tensors)


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
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


def old_backbone(adapter: Source, source_model: Any, revision: str | None, access: dict[str, Any]) -> Any:
    """Return a function that opens the old backbone when it is wanted: a published map can make it unnecessary."""
    if source_model is not None:
        return lambda: Backbone.open(source_model, revision=revision, **access)
    name, own = named_base(adapter)
    stranger = adapter.folder is None
    return lambda: Backbone.open(name, revision=revision or own, hub_only=stranger, **access)


def named_base(adapter: Source, *, do: str = "name the old backbone (--from, source_model=)") -> tuple[str, str | None]:
    """Return the base model that an adapter's config names, and its revision."""
    config = read_config(adapter)
    name = config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise LoraSuiteError("the adapter's config names no base model", where=adapter.name, do=do)
    return name, config.get("revision")


def peft_config(adapter: Adapter, *, base: str, revision: str | None = None) -> dict[str, Any]:
    """Return PEFT's config as it is written: full module names, one r, alpha = r; AdaLoRA keeps its ranks and scaling.

    A plain dictionary: importing PEFT takes longer than an upgrade, and PEFT fills in its defaults when it reads.
    """
    sites = by_site(adapter)
    names = {f"{adapter.arch.layer_path}.{layer}.{site.path}": update for (layer, site), update in sites.items()}
    settings = dict(adapter.settings)
    rank = int(settings.pop("r", 0) or adapter.rank)
    common = {
        "peft_type": "ADALORA" if adapter.kind == "adalora" else "LORA",
        "peft_version": version("peft"),
        "target_modules": sorted([*names, *settings.pop("target_modules", [])]),
        "fan_in_fan_out": any(site.conv1d for _, site in sites),
        "task_type": adapter.config.get("task_type") or "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "bias": "none",
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        **settings,
    }
    if adapter.kind == "adalora":
        return common | adalora.peft_config(names, adapter.config)
    biased = any(update.bias is not None for update in sites.values())
    return common | {"r": rank, "lora_alpha": rank, "lora_bias": biased, "use_dora": adapter.kind == "dora"}


def write(adapter: Adapter, folder: Path, *, base: str, revision: str | None = None) -> None:
    """Write a plain PEFT folder into an existing, empty folder."""
    from safetensors.torch import save_file

    config = peft_config(adapter, base=base, revision=revision)
    save_file(state_dict(adapter), folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _placed(rows: Tensor, order: Tensor) -> Tensor:
    placed = torch.empty_like(rows)
    placed[order] = rows
    return placed
