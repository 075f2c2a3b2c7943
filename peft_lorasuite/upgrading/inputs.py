"""What an upgrade needs: which files are read and which models are opened, decided in one place for all callers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from ..adapters.adapter import Adapter
from ..adapters.loading import old_backbone_loader
from ..adapters.peft_format import select_adapter
from ..adapters.reading import adapter_needs_backbones
from ..arch.spec import Architecture
from ..errors import LoraSuiteError, check_integer
from ..io.source import LoadOptions, Source
from ..mapping.upgrade_map import UpgradeMap
from ..methods.registry import reads_old
from ..models.backbone import Backbone
from ..progress import Progress, no_progress
from .map_cache import load_or_build_map

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BackboneLike: TypeAlias = "str | Path | PreTrainedModel | Backbone"
"""A folder, a Hub id (``owner/name`` or ``owner/name@revision``), a loaded model, or a `Backbone`."""
AdapterLike: TypeAlias = "str | Path | Source | Adapter"
"""A folder or Hub id of a PEFT adapter, or one that was read."""
DEFAULTS = LoadOptions()
MapLike: TypeAlias = "str | Path | UpgradeMap"
"""An upgrade map, or the folder or Hub id of one."""


@dataclass(frozen=True, eq=False)
class UpgradeInputs:
    """What an upgrade works on.

    Attributes:
        source: Where the adapter is.
        new: The new backbone.
        upgrade_map: The map of the pair.
        old: The old backbone, where the upgrade reads or runs it.
    """

    source: Source
    new: Backbone
    upgrade_map: UpgradeMap
    old: Backbone | None


def open_inputs(
    adapter: str | Path,
    new: BackboneLike,
    *,
    old: BackboneLike | None = None,
    upgrade_map: MapLike | None = None,
    method: str = "auto",
    prompts: bool = False,
    rank: int | None = None,
    adapter_name: str | None = None,
    names_result: bool = False,
    revision: str | None = None,
    new_revision: str | None = None,
    old_revision: str | None = None,
    load: LoadOptions = DEFAULTS,
    low_memory: bool = False,
    progress: Progress = no_progress,
) -> UpgradeInputs:
    """Open what upgrading one adapter needs, and nothing else; everything that can be refused early is.

    Args:
        adapter: Folder or Hub id of the adapter.
        new: The new backbone.
        old: The old backbone; by default the one that the adapter's config names.
        upgrade_map: The map of the pair; by default the cached one, built if need be.
        method: Name of the method.
        prompts: Whether the caller has prompts.
        rank: Rank of the result.
        adapter_name: Which adapter, where the folder holds several in sub-folders.
        names_result: Whether that name is also what the result is called; a folder with one adapter may have any then.
        revision: The adapter's revision.
        new_revision: The new backbone's.
        old_revision: The old backbone's.
        load: How files are fetched and models are loaded.
        low_memory: If the map has to be built: with the backbones' layers on disk.
        progress: Shows the progress.
    """
    opened = Backbone.open(new, revision=new_revision, **load.model_kwargs())
    check_rank(rank, opened.arch)
    source = select_adapter(
        Source(str(adapter), "adapter", revision, **load.hub_kwargs()), adapter_name, names_result=names_result
    )
    reads = adapter_needs_backbones(source)
    find_old = old_backbone_loader(source, old, old_revision, load.model_kwargs())
    found, needed = open_pair(
        find_old, opened, upgrade_map=upgrade_map, method=method, reads=reads or prompts or old is not None, load=load,
        low_memory=low_memory, progress=progress,
    )  # fmt: skip
    return UpgradeInputs(source, opened, found, needed)


def open_pair(
    old: Callable[[], Backbone],
    new: Backbone,
    *,
    upgrade_map: MapLike | None = None,
    method: str = "auto",
    reads: bool = False,
    load: LoadOptions = DEFAULTS,
    low_memory: bool = False,
    progress: Progress = no_progress,
) -> tuple[UpgradeMap, Backbone | None]:
    """Return the map of a pair, and the old backbone if it is to be read or run.

    Without a map the old backbone is fetched anyway, and `auto` may run it. With one it is left alone unless the method
    reads it, or ``reads`` says that something else does: the kind of adapter, the caller's prompts, or the caller who
    named it.

    Args:
        old: Opens the old backbone.
        new: The new backbone.
        upgrade_map: The map, or where to load it from; by default the cached one, built if need be.
        method: Name of the method.
        reads: Whether the old backbone is needed whatever the method does.
        load: How the map is fetched.
        low_memory: If the map has to be built: with the backbones' layers on disk.
        progress: Shows the progress.
    """
    if upgrade_map is None:
        opened = old()
        methods = () if method == "auto" else (method,)
        return load_or_build_map(opened, new, methods=methods, low_memory=low_memory, progress=progress), opened
    if not isinstance(upgrade_map, UpgradeMap):
        upgrade_map = UpgradeMap.load(upgrade_map, **load.hub_kwargs())
    return upgrade_map, old() if reads or reads_old(method, upgrade_map) else None


def check_rank(rank: int | None, arch: Architecture) -> None:
    """Refuse, before the long work, a rank that no module of the new backbone can have."""
    if rank is None:
        return
    check_integer("rank", rank)
    most = max(min(arch.shape(part)) for part in arch.parts)
    if rank > most:
        raise LoraSuiteError("the rank is above the modules' dimensions", where="rank", got=rank, wanted=f"1 to {most}")
