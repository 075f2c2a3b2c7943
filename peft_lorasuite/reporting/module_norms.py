"""The norm of an adapter's update in every module, before and after the upgrade, and of the weights it changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..adapters.adapter import Adapter
from ..adapters.reading import base_model_of, read_adapter
from ..errors import LoraSuiteError
from ..io.source import Source
from ..models.backbone import Backbone


@dataclass(frozen=True)
class ModuleNorm:
    """Norms of one module of the new backbone.

    Attributes:
        layer: Index of its layer.
        site: Its path inside the layer.
        energy: Share of the update's energy ``||dW||_F^2`` that is left at the final rank, from 0 to 1.
        new: ``||dW||_F`` of the transferred update.
        old: ``||dW||_F`` of the old update that it comes from; None if it is not known.
        new_weight: ``||W||_F`` of the module; None if the new backbone was not read.
        old_weight: ``||W||_F`` of the old module; None if the old backbone was not read.
    """

    layer: int
    site: str
    energy: float
    new: float
    old: float | None = None
    new_weight: float | None = None
    old_weight: float | None = None


@dataclass(frozen=True)
class NormTable:
    """Norms of all modules.

    Attributes:
        modules: One record per module of the report.
        missing: What could not be read -> the reason.
    """

    modules: tuple[ModuleNorm, ...]
    missing: Mapping[str, str]

    @property
    def relative(self) -> bool:
        """Whether the norm of every module's weights is known, so that updates can be shown relative to them."""
        return all(row.new_weight and (row.old is None or row.old_weight) for row in self.modules)


def measure_norms(
    report: Mapping[str, Any], upgraded: Source, adapter: Source | None, bases: Sequence[Any] = (None, None)
) -> NormTable:
    """Measure every module of a report. Reads only backbones that are on this machine; downloads nothing.

    Args:
        report: Values of ``lorasuite_report.json``.
        upgraded: The upgraded adapter; its config has the new backbone.
        adapter: The old adapter; its config has the old backbone.
        bases: Old and new backbone, where the adapters' configs do not have their current paths.

    Returns:
        The norms, and why some of them are missing.
    """
    missing: dict[str, str] = {}
    new = _try(missing, "the new backbone", lambda: _open_local(upgraded, bases[1]))
    old = source = None
    if adapter is None:
        missing["the old adapter"] = "not given, and not on the Hub (--old-adapter)"
    else:
        old = _try(missing, "the old backbone", lambda: _open_local(adapter, bases[0]))
        if old is not None:
            source = _try(missing, "the old adapter", lambda: read_adapter(adapter, old.arch, old=old))
    modules = report["modules"]
    norms = _try(missing, "the weights", lambda: tuple(_measure(module, new, old, source) for module in modules))
    if norms is None:  # a backbone whose config is on this machine and whose weights are not
        norms = tuple(_measure(module, None, None, source) for module in modules)
    return NormTable(norms, missing)


def _try(missing: dict[str, str], name: str, function: Callable[[], Any]) -> Any:
    """Call a function; return None and record the reason if it fails: a report without a figure is better than none."""
    try:
        return function()
    except LoraSuiteError as error:
        missing[name] = str(error)
        return None


def _open_local(adapter: Source, base: Any) -> Backbone:
    """Open ``base``, or the base model of an adapter's config, if config and weights are on this machine."""
    name, revision = (base, None) if base else base_model_of(adapter, do="pass it (--from, --to)")
    untrusted = base is None and adapter.folder is None
    backbone = Backbone.open(name, revision=revision, local_files_only=True, hub_only=untrusted)
    backbone.arch  # noqa: B018 (reads the config, so that a missing one is reported here)
    backbone.locate(f"{backbone.arch.embedding}.weight")
    return backbone


def _measure(
    module: Mapping[str, Any], new: Backbone | None, old: Backbone | None, source: Adapter | None
) -> ModuleNorm:
    path = str(module["module"])
    layer, site = _split_path(path)
    origins = [(int(layer), str(part)) for layer, part in module.get("from", {}).values()]
    known = [key for key in origins if source is not None and key in source.updates]
    values: dict[str, float] = {}
    if new is not None:
        values["new_weight"] = float(new.tensor(f"{path}.weight").norm())
    if source is not None and known:
        values["old"] = _root_sum_of_squares(source.updates[key].norm() for key in known)
    if old is not None and known:
        values["old_weight"] = _root_sum_of_squares(float(old.part(*key).norm()) for key in known)
    return ModuleNorm(layer, site, float(module["energy_kept"]), float(module["norm"]), **values)


def _split_path(path: str) -> tuple[int, str]:
    """Split ``model.layers.3.self_attn.q_proj`` into the layer and the path inside it."""
    names = path.split(".")
    index = next((index for index, name in enumerate(names) if name.isdigit()), None)
    if index is None:
        raise LoraSuiteError("a module of the report has no layer index", got=repr(path))
    return int(names[index]), ".".join(names[index + 1 :])


def _root_sum_of_squares(norms: Iterable[float]) -> float:
    """Norm of the fused module: the parts' rows stand one above the other."""
    return sum(norm**2 for norm in norms) ** 0.5
