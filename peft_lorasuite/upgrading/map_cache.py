"""The cache of upgrade maps built on this machine, by the identities of both backbones."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import Any

from ..errors import LoraSuiteError
from ..io.temporary import remove_leftovers
from ..mapping.fingerprint import Identity, find_mismatch
from ..mapping.storage import read_description
from ..mapping.upgrade_map import META, MapOptions, UpgradeMap
from ..methods.registry import find
from ..methods.sections import add_section
from ..models.backbone import Backbone
from ..models.distributed import is_main_process, wait_for_everyone
from ..progress import Progress, no_progress, stage
from ..text.vocabulary import tokenizer_hash

log = logging.getLogger(__name__)

WITHOUT_EFFECT = re.compile(
    r"_.*|transformers_version|architectures|auto_map|model_type|(torch_)?dtype|use_cache|.*_token_id|quantization_config"
    r"|.*dropout.*|.*_pdrop|initializer_.*|id2label|label2id|num_labels|problem_type|task_specific_params|output_.*"
    r"|return_dict|pretraining_tp"
)
"""Names in a config of values that change nothing of what the layers compute in a forward pass."""


def cache_folder() -> Path:
    """Return the folder of the cached maps, in ``HF_HOME``."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "lorasuite" / "maps"


def load_or_build_map(
    old: Backbone, new: Backbone, options: MapOptions | None = None, *, methods: Iterable[str] = (),
    low_memory: bool = False, progress: Progress = no_progress,
) -> UpgradeMap:  # fmt: skip
    """Return the cached map of a pair, or build and cache it; a cache that cannot be read or written is a warning.

    Args:
        old: The old backbone.
        new: The new backbone.
        options: How the map is built; maps with other options are cached separately.
        methods: Methods whose sections the map must have; missing ones are built and cached.
        low_memory: Build the map with the layers of the backbones on disk; the result is the same.
        progress: Shows the progress.
    """
    if not (old.arch.has_converter and new.arch.has_converter):  # read in seconds, and there is nothing to build
        return UpgradeMap.build(old, new, options)
    options = options or MapOptions()
    folder = _cache_entry(old, new, options)
    upgrade_map = _load_cached(folder)
    changed = upgrade_map is None
    if upgrade_map is None:
        upgrade_map = UpgradeMap.build(old, new, options, low_memory=low_memory, progress=progress)
    for name in methods:
        section = find(name).section
        if section is not None and section.name not in upgrade_map.sections:
            with stage(progress, f"building the section of the map for {name}"):
                upgrade_map, changed = add_section(upgrade_map, name, old, new, progress=progress), True
    if changed and folder is not None and is_main_process():
        _save(upgrade_map, folder)
    wait_for_everyone()
    return upgrade_map


def _save(upgrade_map: UpgradeMap, folder: Path) -> None:
    try:
        upgrade_map.save(folder, overwrite=True)
    except (LoraSuiteError, OSError) as error:
        log.warning("the upgrade map is not cached, and the next run builds it again: %s", error)


def _load_cached(folder: Path | None) -> UpgradeMap | None:
    """Load a cached map; None if there is none, or if it is broken."""
    if folder is None or not (folder / META).is_file():
        return None
    try:
        upgrade_map = UpgradeMap.load(folder)
        for section in upgrade_map.sections.values():
            section.check()
    except (ValueError, OSError) as error:
        log.warning("the cached upgrade map is broken and is built again: %s", error)
        return None
    log.info("using the cached upgrade map %s", folder)
    return upgrade_map


def _cache_entry(old: Backbone, new: Backbone, options: MapOptions) -> Path | None:
    """Return the folder of a pair's map, or a free one; None if the cache cannot be read.

    The name has architectures, configs and vocabularies, which are the same for all fine-tunes of one base, and a
    number.
    """
    sides = [[one.arch.to_dict(), _computed_values(one.config), tokenizer_hash(one.tokenizer)] for one in (old, new)]
    pair, settings = (hashlib.sha256(text.encode()).hexdigest() for text in (_as_json(sides), repr(options)))
    folders = (cache_folder() / f"{pair[:32]}--{settings[:8]}--{number}" for number in count())
    remove_leftovers(cache_folder())
    try:
        return next(folder for folder in folders if not (folder / META).is_file() or _is_usable(folder, old, new))
    except OSError as error:
        log.warning("%s: the cache of upgrade maps cannot be read: %s", cache_folder(), error.strerror)
        return None


def _computed_values(config: Any) -> dict[str, Any]:
    """Return the values of a config with which the model may compute something else: the layer map depends on them."""
    values = config.get_text_config().to_dict()
    return {name: value for name, value in values.items() if not WITHOUT_EFFECT.fullmatch(name)}


def _as_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _is_usable(folder: Path, old: Backbone, new: Backbone) -> bool:
    """Whether a cached map is of this pair, or malformed or of another format, so that it can be replaced."""
    try:
        meta = read_description(folder / META, where=str(folder / META))
        identities = [Identity.from_dict(meta[role]) for role in ("old", "new")]
    except LoraSuiteError:
        return True
    return not any(find_mismatch(wanted, one) for wanted, one in zip(identities, (old, new), strict=True))
