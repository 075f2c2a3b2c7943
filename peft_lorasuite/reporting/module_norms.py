"""How large an adapter's update is against the weights it changes, module by module, before the upgrade and after."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..adapters.adapter import Adapter
from ..adapters.reading import named_base, read
from ..errors import LoraSuiteError
from ..io.source import Source
from ..models.backbone import Backbone


@dataclass(frozen=True)
class Size:
    """One module of the new backbone.

    Attributes:
        layer: Its layer.
        site: Its path inside the layer.
        energy: Share of the update's energy that the rank kept, from 0 to 1.
        new: ``||dW||_F`` of its update, as transferred.
        old: ``||dW||_F`` of the old update that it came from; None where none is known.
        new_weight: ``||W||_F`` of the module; None where the backbone is not at hand.
        old_weight: ``||W||_F`` of the old module.
    """

    layer: int
    site: str
    energy: float
    new: float
    old: float | None = None
    new_weight: float | None = None
    old_weight: float | None = None


@dataclass(frozen=True)
class Sizes:
    """All modules, and for what could not be had, why."""

    rows: tuple[Size, ...]
    missing: Mapping[str, str]

    @property
    def relative(self) -> bool:
        """Whether every module's own weights were read, so that the updates can be put against them."""
        return all(row.new_weight and (row.old is None or row.old_weight) for row in self.rows)


def sizes(
    report: Mapping[str, Any], upgraded: Source, adapter: Source | None, bases: Sequence[Any] = (None, None)
) -> Sizes:
    """Measure every module that a report names.

    Args:
        report: Values of ``lorasuite_report.json``.
        upgraded: The upgraded adapter; its config names the new backbone.
        adapter: The old adapter; its config names the old backbone.
        bases: Old and new backbone, where they are not, or no longer, where the configs say.

    Backbones are read where they are on this machine; nothing is fetched for this.
    """
    missing: dict[str, str] = {}
    new = _tried(missing, "the new backbone", lambda: _backbone(upgraded, bases[1]))
    old = source = None
    if adapter is None:
        missing["the old adapter"] = "not named, and not on the Hub (--old-adapter)"
    else:
        old = _tried(missing, "the old backbone", lambda: _backbone(adapter, bases[0]))
        if old is not None:
            source = _tried(missing, "the old adapter", lambda: read(adapter, old.arch, old=old))
    modules = report["modules"]
    rows = _tried(missing, "the weights", lambda: tuple(_size(module, new, old, source) for module in modules))
    if rows is None:  # a backbone whose config is here and whose weights are not
        rows = bare_sizes(report, source)
    return Sizes(rows, missing)


def bare_sizes(report: Mapping[str, Any], source: Adapter | None = None) -> tuple[Size, ...]:
    """Return what a report alone tells of its modules, and the old updates' norms if the old adapter is given."""
    return tuple(_size(module, None, None, source) for module in report["modules"])


def _tried(missing: dict[str, str], name: str, work: Callable[[], Any]) -> Any:
    """Return what the work gives, or None and note why: a report lacks a figure rather than fail."""
    try:
        return work()
    except LoraSuiteError as error:
        missing[name] = str(error)
        return None


def _backbone(adapter: Source, given: Any) -> Backbone:
    """Open the backbone that is given or that an adapter's config names, if it is on this machine with its weights."""
    name, revision = (given, None) if given else named_base(adapter, do="name it (--from, --to)")
    strange = given is None and adapter.folder is None
    found = Backbone.open(name, revision=revision, local_files_only=True, hub_only=strange)
    found.arch  # noqa: B018 (reads the config, so that what is missing is missed here)
    found.locate(f"{found.arch.embedding}.weight")
    return found


def _size(module: Mapping[str, Any], new: Backbone | None, old: Backbone | None, source: Adapter | None) -> Size:
    path = str(module["module"])
    layer, site = _place(path)
    came = [(int(layer), str(part)) for layer, part in module.get("from", {}).values()]
    known = [key for key in came if source is not None and key in source.updates]
    size = Size(layer, site, float(module["energy_kept"]), float(module["norm"]))
    values: dict[str, float] = {}
    if new is not None:
        values["new_weight"] = float(new.tensor(f"{path}.weight").norm())
    if source is not None and known:
        values["old"] = _together(source.updates[key].norm() for key in known)
    if old is not None and known:
        values["old_weight"] = _together(float(old.part(*key).norm()) for key in known)
    return Size(**{**vars(size), **values})


def _place(path: str) -> tuple[int, str]:
    """Split ``model.layers.3.self_attn.q_proj`` into the layer and the path inside it."""
    words = path.split(".")
    number = next((place for place, word in enumerate(words) if word.isdigit()), None)
    if number is None:
        raise LoraSuiteError("the report names a module without a layer", got=repr(path))
    return int(words[number]), ".".join(words[number + 1 :])


def _together(norms: Any) -> float:
    return sum(norm**2 for norm in norms) ** 0.5
