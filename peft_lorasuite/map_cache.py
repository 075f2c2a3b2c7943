"""Upgrade maps that were built on this machine, kept under the identities of both backbones."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .backbone import Backbone
from .identity import Identity, identify
from .methods.base import find
from .processes import is_first, wait
from .progress import Progress, silent
from .upgrade_map import META, MapOptions, UpgradeMap

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Folder of the cached maps, beside the Hub's cache (``HF_HOME``)."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "lorasuite" / "maps"


def map_for(
    old: Backbone, new: Backbone, options: MapOptions | None = None, *, methods: Iterable[str] = (),
    low_memory: bool = False, progress: Progress = silent, **settings: Any,
) -> UpgradeMap:  # fmt: skip
    """Return the cached map of a pair, or build it and keep it; says which in the log.

    ``low_memory`` is how it is built if it has to be; the map is the same. Sections of ``methods`` that the kept map
    lacks are added to it and kept as well.
    """
    options = options or MapOptions()
    folder = cache_folder() / _name(identify(old), identify(new), options)
    if settings:
        log.info("building the upgrade map of %r and %r", old, new)
        return UpgradeMap.build(
            old, new, options, methods=methods, low_memory=low_memory, progress=progress, **settings
        )
    if (folder / META).is_file():
        log.info("using the cached upgrade map %s", folder)
        found, lacking = UpgradeMap.load(folder), False
    else:
        log.info("building the upgrade map of %r and %r", old, new)
        found, lacking = UpgradeMap.build(old, new, options, low_memory=low_memory, progress=progress), True
    for name in methods:
        section = find(name).section
        if section is not None and section.name not in found.sections:
            log.info("building its section for %s", name)
            found, lacking = found.with_section(name, old, new, low_memory=low_memory, progress=progress), True
    if lacking and is_first():
        found.save(folder, overwrite=True)
    wait()
    return found


def _name(old: Identity, new: Identity, options: MapOptions) -> str:
    chosen = hashlib.sha256(repr(options).encode()).hexdigest()[:8]
    return f"{old.key}--{new.key}--{chosen}"
