"""Upgrade maps that were built on this machine, kept under the identities of both backbones."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from itertools import count
from pathlib import Path

from ..io.source import read_json
from ..mapping.fingerprint import Identity, find_differences
from ..mapping.upgrade_map import META, MapOptions, UpgradeMap
from ..methods.registry import find
from ..methods.sections import add_section
from ..models.backbone import Backbone
from ..models.distributed import is_main_process, wait_for_everyone
from ..progress import Progress, no_progress
from ..text.vocabulary import tokenizer_hash

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Folder of the cached maps, beside the Hub's cache (``HF_HOME``)."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "lorasuite" / "maps"


def load_or_build_map(
    old: Backbone, new: Backbone, options: MapOptions | None = None, *, methods: Iterable[str] = (),
    low_memory: bool = False, progress: Progress = no_progress,
) -> UpgradeMap:  # fmt: skip
    """Return the cached map of a pair, or build it and cache it; the log says which.

    Sections of ``methods`` that the cached map lacks are added to it and cached as well; methods without a section need
    none. ``low_memory`` is how the map is built if it has to be; the result is the same.
    """
    options = options or MapOptions()
    folder = _folder(old, new, options)
    found = _cached(folder)
    changed = found is None
    if found is None:
        log.info("building the upgrade map of %r and %r", old, new)
        found = UpgradeMap.build(old, new, options, low_memory=low_memory, progress=progress)
    for name in methods:
        section = find(name).section
        if section is not None and section.name not in found.sections:
            log.info("building its section for %s", name)
            found, changed = add_section(found, name, old, new, progress=progress), True
    if changed and is_main_process():
        found.save(folder, overwrite=True)
    wait_for_everyone()
    return found


def _cached(folder: Path) -> UpgradeMap | None:
    """Return the map that is kept in a folder; one that cannot be read is no more than one that is not there."""
    if not (folder / META).is_file():
        return None
    try:
        found = UpgradeMap.load(folder)
        for section in found.sections.values():
            section.check()
    except ValueError as error:
        log.warning("the kept upgrade map cannot be used and is built anew: %s", error)
        return None
    log.info("using the cached upgrade map %s", folder)
    return found


def _folder(old: Backbone, new: Backbone, options: MapOptions) -> Path:
    """Return the folder of a pair's map, or a free one: fine-tunes of one base have equal shapes and vocabularies."""
    first, second = (f"{one.arch.sizes()}{tokenizer_hash(one.tokenizer)}" for one in (old, new))
    pair, chosen = (hashlib.sha256(text.encode()).hexdigest() for text in (f"{first} {second}", repr(options)))
    places = (cache_folder() / f"{pair[:32]}--{chosen[:8]}--{number}" for number in count())
    return next(place for place in places if not (place / META).is_file() or _fits(place, old, new))


def _fits(folder: Path, old: Backbone, new: Backbone) -> bool:
    """Whether a kept map is of this pair; one that does not even say of which makes room."""
    try:
        meta = read_json(folder / META, where=str(folder / META))
        kept = [Identity.from_dict(meta[role]) for role in ("old", "new")]
    except (KeyError, TypeError, AttributeError, ValueError):
        return True
    return not any(find_differences(wanted, one) for wanted, one in zip(kept, (old, new), strict=True))
