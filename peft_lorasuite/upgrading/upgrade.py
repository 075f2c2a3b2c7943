"""upgrade(adapter, map, method): converts one adapter, in four phases: check, prepare, convert, report."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..adapters.adapter import Adapter, Key, join_sites
from ..adapters.peft_format import select_adapter
from ..adapters.reading import read_adapter
from ..adapters.writing import REPORT, write_adapter
from ..arch.differences import differences
from ..arch.layout import split
from ..arch.spec import Architecture
from ..errors import LoraSuiteError, check_seed, error_context
from ..io.output import atomic_folder, check_not_input
from ..io.source import LoadOptions, Source
from ..linalg.lowrank import LowRank
from ..mapping.fingerprint import check_identity, public_name
from ..mapping.upgrade_map import UpgradeMap
from ..methods.base import MethodInput, MethodResult
from ..methods.options import make_options
from ..methods.registry import find
from ..models.backbone import Backbone
from ..progress import Progress, no_progress
from ..text.examples import PromptsLike
from . import auto, prediction, variants
from .inputs import AdapterLike, BackboneLike, MapLike, check_rank
from .report import Report, fates

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Upgraded:
    """An adapter for the new backbone, the report of how it came about, and where the old adapter was read from."""

    adapter: Adapter
    report: Report
    base: str
    revision: str | None = None
    source: Source | None = None

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write a plain PEFT folder with the report, whole or not at all."""
        check_not_input(folder, (self.base, self.source and self.source.folder))
        with atomic_folder(folder, overwrite=overwrite) as part:
            self.write(part)
        return Path(folder)

    def write(self, folder: Path) -> None:
        """Write into an existing, empty folder."""
        write_adapter(self.adapter, folder, base=self.base, revision=self.revision)
        text = json.dumps(self.report.to_dict(), indent=2) + "\n"
        (folder / REPORT).write_text(text, encoding="utf-8")


def upgrade(
    adapter: AdapterLike,
    upgrade_map: MapLike,
    *,
    method: str = "auto",
    options: Any = None,
    old: BackboneLike | None = None,
    new: BackboneLike | None = None,
    prompts: PromptsLike | None = None,
    rank: int | None = None,
    output_type: str = "same",
    seed: int = 0,
    adapter_name: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    progress: Progress = no_progress,
) -> Upgraded:
    """Convert an adapter for the new backbone of an upgrade map.

    Args:
        adapter: Folder or Hub id of a PEFT adapter, or one that was read.
        upgrade_map: The map of the pair of backbones, or where to load it from.
        method: Name of a method, or ``"auto"``.
        options: The method's options: its dataclass, or a mapping of names to values.
        old: The old backbone, for methods that run or read it.
        new: The new backbone, likewise.
        prompts: Unlabeled prompts, for methods that run the models.
        rank: Rank of the result; the source's largest by default.
        output_type: ``"same"``: a DoRA becomes a DoRA again, an AdaLoRA an AdaLoRA; ``"lora"``: a plain LoRA. All other
            types become a LoRA either way.
        seed: Of padding and of whatever the method draws.
        adapter_name: Which adapter, where the folder holds several in sub-folders.
        revision: The adapter's revision on the Hub.
        token: Hub token.
        cache_dir: Hub cache.
        progress: Shows the progress of a long step.

    Raises:
        LoraSuiteError: When a file is missing or malformed, a backbone is not the map's, an option is out of range, or
            nothing of the adapter can be transferred.
    """
    load = LoadOptions(token, cache_dir)
    upgrade_map, old, new = _check(upgrade_map, old, new, rank, seed, load)
    adapter = _prepare(adapter, upgrade_map, old, rank, output_type, adapter_name, revision, load)
    found: dict[str, Any] = _other_base(adapter, upgrade_map)
    if method == "auto":
        picked = auto.pick(upgrade_map, can_run=old is not None and new is not None)
        method, found["auto"] = picked.method, picked.why
        log.info("method %s: %s", picked.method, picked.why)
    chosen = find(method)
    settings = make_options(chosen, options)
    inputs = MethodInput(adapter, upgrade_map, old, new, prompts, seed, progress)
    with error_context(f"{chosen.name} of {adapter.origin}"):
        draft = chosen.run(inputs, settings)
        found["prediction"] = prediction.facts(upgrade_map, method, draft.facts)
        result, modules, facts, dropped = _convert(inputs, draft, rank, output_type, method)
    report = Report(
        adapter=public_name(adapter.origin),
        old=public_name(upgrade_map.old.name),
        new=public_name(upgrade_map.new.name),
        method={"name": chosen.name, "options": asdict(settings)},
        rank=result.rank or rank or draft.rank or adapter.rank,
        modules=modules,
        tensors=dict(sorted({**fates(adapter, draft), **dropped}.items())),
        facts={**found, **draft.facts, **facts, "differences": differences(upgrade_map.old.arch, upgrade_map.new.arch)},
        revisions=_revisions(adapter, upgrade_map, old, new),
    )
    base = (upgrade_map.new.name, upgrade_map.new.revision)
    if new is not None:
        base = (new.name, None if new.source.folder else new.source.revision)
    return Upgraded(result, report, *base, adapter.source)


def _check(
    upgrade_map: MapLike, old: BackboneLike | None, new: BackboneLike | None, rank: int | None, seed: int,
    load: LoadOptions,
) -> tuple[UpgradeMap, Backbone | None, Backbone | None]:  # fmt: skip
    """Open the map and the backbones, and refuse what does not fit together before the long work."""
    check_seed(seed)
    if not isinstance(upgrade_map, UpgradeMap):
        upgrade_map = UpgradeMap.load(upgrade_map, **load.hub_kwargs())
    check_rank(rank, upgrade_map.new.arch)
    opened = {role: None if one is None else Backbone.open(one) for role, one in (("old", old), ("new", new))}
    for role, backbone in opened.items():
        if backbone is not None:
            check_identity(getattr(upgrade_map, role), backbone, role)
    return upgrade_map, opened["old"], opened["new"]


def _prepare(
    adapter: AdapterLike, upgrade_map: UpgradeMap, old: Backbone | None, rank: int | None, output_type: str,
    adapter_name: str | None, revision: str | None, load: LoadOptions,
) -> Adapter:  # fmt: skip
    """Read the adapter, and make it the type that the result is to have."""
    if not isinstance(adapter, Adapter):
        source = (
            adapter if isinstance(adapter, Source) else Source(str(adapter), "adapter", revision, **load.hub_kwargs())
        )
        adapter = read_adapter(select_adapter(source, adapter_name), upgrade_map.old.arch, old=old, rank=rank)
    return variants.prepare(adapter, output_type, old, rank)


def _convert(
    inputs: MethodInput, draft: MethodResult, rank: int | None, output_type: str, method: str
) -> tuple[Adapter, list[dict[str, Any]], dict[str, Any], dict[str, str]]:
    """Make an adapter of a method's result: the adapter, its modules and facts for the report, fates of tensors."""
    adapter, arch = inputs.adapter, inputs.map.new.arch
    if not draft.updates and not adapter.tables:
        raise LoraSuiteError("nothing of the adapter can be transferred to the new backbone", got=dict(draft.dropped))
    final = rank or draft.rank or adapter.rank
    result, modules = join_modules(draft, arch, final, inputs.seed, adapter)
    result, facts, others = variants.complete(result, inputs, draft, output_type=output_type, method=method, rank=final)
    return result, modules, facts, others


def _other_base(adapter: Adapter, upgrade_map: UpgradeMap) -> dict[str, str]:
    """Report an adapter whose config has another backbone than the map's old one.

    A warning only: a folder may be a copy of a repository. Where one side is a folder the last names are compared.
    """
    named = adapter.config.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        return {}
    names = [public_name(re.sub(r"@[^/]*$", "", text)) for text in (named, upgrade_map.old.name)]
    compared = names if all("/" in name for name in names) else [name.rpartition("/")[2] for name in names]
    if compared[0] == compared[1]:
        return {}
    warning = f"the adapter's config has the base model {names[0]}, and the map was built for {names[1]}"
    log.warning("%s: make sure that they are the same", warning)
    return {"named_base": warning}


def _revisions(
    adapter: Adapter, upgrade_map: UpgradeMap, old: Backbone | None, new: Backbone | None
) -> dict[str, str | None]:
    """Commits of what the result was made from; a backbone that was not opened has the map's."""
    return {
        "adapter": adapter.source.commit if adapter.source else None,
        "old": old.source.commit if old else upgrade_map.old.revision,
        "new": new.source.commit if new else upgrade_map.new.revision,
    }


def join_modules(
    draft: MethodResult, arch: Architecture, rank: int, seed: int, source: Adapter
) -> tuple[Adapter, list[dict[str, Any]]]:
    """Join fused modules and bring every module to one rank; report the energy that this keeps."""
    generator = torch.Generator().manual_seed(seed)
    updates: dict[Key, LowRank] = {}
    modules = []
    for (layer, site), whole in join_sites(draft.updates, arch).items():
        where = f"{arch.layer_path}.{layer}.{site.path}"
        if rank > min(whole.shape):
            raise LoraSuiteError(
                "the rank is above the module's dimensions", where=where, got=rank, wanted=f"at most {min(whole.shape)}"
            )
        own = variants.own_rank(source, draft, layer, site, rank)
        cut, kept = whole.truncated(own)
        even = cut.padded(own, generator)
        rows = split(even.B, site, arch)
        biases = {} if even.bias is None else split(even.bias, site, arch)
        for part in site.parts:
            updates[layer, part] = LowRank(even.A, rows[part], biases.get(part))
        parts = [part for part in site.parts if (layer, part) in draft.updates]
        modules.append(
            {
                "module": where,
                "from": {part: list(draft.sources[layer, part]) for part in parts if (layer, part) in draft.sources},
                "energy_kept": round(kept, 6),
                "norm": round(even.norm(), 6),
                "figures": {
                    part: _rounded(draft.figures[layer, part]) for part in parts if (layer, part) in draft.figures
                },
            }
        )
    return Adapter(arch, updates, source.config), modules


def _rounded(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 6) for name, value in figures.items()}
