"""upgrade(adapter, map, method): the only place where an adapter and an upgrade map meet.

The module is not called ``upgrade``: a submodule of that name would hide the function on the package.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from ..adapters import adapter as adapter_files
from ..adapters.adapter import Adapter, Key, join_sites
from ..adapters.peft_format import select
from ..adapters.writing import REPORT
from ..arch.differences import differences
from ..arch.layout import split
from ..arch.spec import Architecture
from ..checks import check_seed, check_whole
from ..errors import LoraSuiteError, context
from ..io.output import check_apart, whole_folder
from ..io.source import Source
from ..linalg.lowrank import LowRank
from ..mapping.fingerprint import check_same, public_name
from ..mapping.upgrade_map import UpgradeMap
from ..methods import base as methods
from ..models.backbone import Backbone
from ..progress import Progress, silent
from . import auto as choice
from . import variants as kinds

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """What became of an adapter; written beside the weights as ``lorasuite_report.json``.

    Attributes:
        adapter: The adapter that was upgraded.
        old: Its backbone.
        new: The new backbone.
        method: The method that ran, and its options.
        rank: Rank of the result.
        modules: Per new module: its sources, energy kept, residual of the maps.
        tensors: Every tensor of the source -> ``"carried"`` or the reason why not.
        facts: What the method and the map measured, and, for ``auto``, why the method was picked; under
            ``differences``, what the two structures differ in and how that is met; under ``prediction``, what the map
            and the method's own fit let expect; under ``named_base``, that the adapter names
            another backbone than the map's.
        revisions: Commits on the Hub of ``adapter``, ``old`` and ``new``; None for what came from elsewhere.
    """

    adapter: str
    old: str
    new: str
    method: Mapping[str, Any]
    rank: int
    modules: Sequence[Mapping[str, Any]]
    tensors: Mapping[str, str]
    facts: Mapping[str, Any] = field(default_factory=dict)
    revisions: Mapping[str, str | None] = field(default_factory=dict)
    version: str = __version__

    @property
    def coverage(self) -> float:
        """Share of the source's tensors that were carried."""
        return sum(fate == "carried" for fate in self.tensors.values()) / max(len(self.tensors), 1)

    @property
    def energy_kept(self) -> float:
        """Mean share of the energy that rank truncation kept, over the modules."""
        return sum(module["energy_kept"] for module in self.modules) / max(len(self.modules), 1)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "coverage": round(self.coverage, 6), "energy_kept": round(self.energy_kept, 6)}


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
        check_apart(folder, (self.base, self.source and self.source.folder))
        with whole_folder(folder, overwrite=overwrite) as part:
            self.write(part)
        return Path(folder)

    def write(self, folder: Path) -> None:
        """Write into an existing, empty folder."""
        adapter_files.write(self.adapter, folder, base=self.base, revision=self.revision)
        text = json.dumps(self.report.to_dict(), indent=2) + "\n"
        (folder / REPORT).write_text(text, encoding="utf-8")


def upgrade(
    adapter: str | Path | Source | Adapter,
    upgrade_map: UpgradeMap | str | Path,
    *,
    method: str = "auto",
    options: Any = None,
    old: Any = None,
    new: Any = None,
    prompts: Sequence[str] | None = None,
    rank: int | None = None,
    as_: str = "same",
    seed: int = 0,
    adapter_name: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    progress: Progress = silent,
) -> Upgraded:
    """Carry an adapter over to the new backbone of an upgrade map.

    Args:
        adapter: Folder or Hub id of a PEFT adapter, or one that was read.
        upgrade_map: The map of the pair of backbones, or where to load it from.
        method: Name of a method, or ``"auto"``.
        options: The method's options: its dataclass, or a mapping of names to values.
        old: The old backbone, for methods that run or read it.
        new: The new backbone, likewise.
        prompts: Unlabelled prompts, for methods that run the models.
        rank: Rank of the result; the source's largest by default.
        as_: ``"same"``: a DoRA becomes a DoRA again, an AdaLoRA an AdaLoRA; ``"lora"``: a plain LoRA. All other kinds
            become a LoRA either way.
        seed: Of padding and of whatever the method draws.
        adapter_name: Which adapter, where the folder holds several in sub-folders.
        revision: The adapter's revision on the Hub.
        token: Hub token.
        cache_dir: Hub cache.
        progress: Shows how far a long step is.
    """
    check_seed(seed)
    if not isinstance(upgrade_map, UpgradeMap):
        upgrade_map = UpgradeMap.load(upgrade_map, token=token, cache_dir=cache_dir)
    check_rank(rank, upgrade_map.new.arch)
    old, new = (None if one is None else Backbone.open(one) for one in (old, new))
    for backbone, wanted, role in ((old, upgrade_map.old, "old"), (new, upgrade_map.new, "new")):
        if backbone is not None:
            check_same(wanted, backbone, role)
    if not isinstance(adapter, Adapter):
        source = adapter if isinstance(adapter, Source) else Source(str(adapter), "adapter", revision, token, cache_dir)
        adapter = adapter_files.read(select(source, adapter_name), upgrade_map.old.arch, old=old, rank=rank)
    adapter = kinds.prepared(adapter, as_, old, rank)
    told: dict[str, Any] = _other_base(adapter, upgrade_map)
    if method == "auto":
        picked = choice.pick(upgrade_map, can_run=old is not None and new is not None)
        method, told["auto"] = picked.method, picked.why
        log.info("method %s: %s", picked.method, picked.why)
    chosen = methods.find(method)
    settings = methods.make_options(chosen, options)
    job = methods.Job(adapter, upgrade_map, old, new, prompts, seed, progress)
    with context(f"{chosen.name} of {adapter.origin}"):
        draft = chosen.run(job, settings)
        told["prediction"] = choice.facts(upgrade_map, method, draft.facts)
        if not draft.updates and not adapter.tables:
            raise LoraSuiteError("nothing of the adapter has a place in the new backbone", got=dict(draft.dropped))
        final = rank or draft.rank or adapter.rank
        result, modules = finish(draft, upgrade_map.new.arch, final, seed, adapter)
        result, facts, others = kinds.completed(result, job, draft, as_=as_, method=method, rank=final)
    report = Report(
        adapter=public_name(adapter.origin),
        old=public_name(upgrade_map.old.name),
        new=public_name(upgrade_map.new.name),
        method={"name": chosen.name, "options": asdict(settings)},
        rank=result.rank or final,
        modules=modules,
        tensors=dict(sorted({**fates(adapter, draft), **others}.items())),
        facts={**told, **draft.facts, **facts, "differences": differences(upgrade_map.old.arch, upgrade_map.new.arch)},
        revisions=_revisions(adapter, upgrade_map, old, new),
    )
    home = (upgrade_map.new.name, upgrade_map.new.revision)
    if new is not None:
        home = (new.name, None if new.source.folder else new.source.revision)
    return Upgraded(result, report, *home, adapter.source)


def _other_base(adapter: Adapter, upgrade_map: UpgradeMap) -> dict[str, str]:
    """Say where the adapter's config names another backbone than the map's old one.

    No more than that: a folder may be a copy of a repository. Where one side is a folder the last names are compared.
    """
    named = adapter.config.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        return {}
    names = [public_name(re.sub(r"@[^/]*$", "", text)) for text in (named, upgrade_map.old.name)]
    compared = names if all("/" in name for name in names) else [name.rpartition("/")[2] for name in names]
    if compared[0] == compared[1]:
        return {}
    told = f"the adapter's config names the backbone {names[0]}, and the map was built for {names[1]}"
    log.warning("%s: do make sure that they are the same", told)
    return {"named_base": told}


def check_rank(rank: int | None, arch: Architecture) -> None:
    """Refuse, before the long work, a rank that no module of the new backbone can have."""
    if rank is None:
        return
    check_whole("rank", rank)
    most = max(min(arch.shape(part)) for part in arch.parts)
    if rank > most:
        raise LoraSuiteError("the rank is above the modules' dimensions", where="rank", got=rank, wanted=f"1 to {most}")


def _revisions(
    adapter: Adapter, upgrade_map: UpgradeMap, old: Backbone | None, new: Backbone | None
) -> dict[str, str | None]:
    """Commits of what the result was made from; a backbone that was not opened has the map's."""
    return {
        "adapter": adapter.source.commit if adapter.source else None,
        "old": old.source.commit if old else upgrade_map.old.revision,
        "new": new.source.commit if new else upgrade_map.new.revision,
    }


def finish(
    draft: methods.Draft, arch: Architecture, rank: int, seed: int, source: Adapter
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
        own = kinds.own_rank(source, draft, layer, site, rank)
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


def fates(adapter: Adapter, draft: methods.Draft) -> dict[str, str]:
    """Say of every tensor of the source whether it was carried, or why not."""
    reasons: dict[str, list[str]] = {}
    counts: dict[str, int] = {}
    for key, names in adapter.names.items():
        for name in names:
            counts[name] = counts.get(name, 0) + 1
            if key in draft.dropped:
                reasons.setdefault(name, []).append(f"{key[1]}: {draft.dropped[key]}")
    told = {}
    for name, count in counts.items():
        lost = reasons.get(name, [])
        partly = "in part; " if lost and len(lost) < count else ""
        told[name] = f"{partly}not carried: {'; '.join(lost)}" if lost else "carried"
    return dict(sorted({**told, **{name: f"not carried: {why}" for name, why in adapter.unused.items()}}.items()))


def _rounded(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 6) for name, value in figures.items()}
