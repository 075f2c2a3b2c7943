"""Opening the inputs of an upgrade: only the files and models that it needs, decided here for all callers."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..adapters.adapter import Adapter
from ..adapters.chat_template import read_chat_template
from ..adapters.loading import old_backbone_loader
from ..adapters.peft_format import select_adapter
from ..adapters.reading import adapter_needs_backbones, read_config
from ..arch.spec import Architecture
from ..errors import LoraSuiteError, check_integer
from ..io.source import DEFAULTS, LoadOptions, Source
from ..mapping.fingerprint import public_name
from ..mapping.identity_map import identity_map
from ..mapping.same_base import compare_bases
from ..mapping.upgrade_map import UpgradeMap
from ..methods.behavior.classification import needs_texts_error
from ..methods.options import make_options
from ..methods.registry import find, reads_old
from ..models.backbone import Backbone
from ..models.quantized import unquantized_name
from ..models.task import CLASSIFIERS
from ..progress import Progress, no_progress
from ..text.chat_options import ChatOptions
from ..text.chat_pair import ChatPair
from ..text.conversations import Conversation
from ..text.examples import PromptOrText
from .map_cache import load_or_build_map

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

BackboneLike: TypeAlias = "str | Path | PreTrainedModel | Backbone"
"""A folder, a Hub id (``owner/name`` or ``owner/name@revision``), a loaded model, or a `Backbone`."""
AdapterLike: TypeAlias = "str | Path | Source | Adapter"
"""A folder or Hub id of a PEFT adapter, or a loaded `Adapter`."""
MapLike: TypeAlias = "str | Path | UpgradeMap"
"""An upgrade map, or the folder or Hub id of one."""


@dataclass(frozen=True, eq=False)
class UpgradeInputs:
    """The inputs of an upgrade.

    Attributes:
        source: Folder or repository of the adapter.
        new: The new backbone.
        upgrade_map: The map of the pair.
        old: The old backbone, if the upgrade reads or runs it.
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
    options: Any = None,
    prompts: Sequence[PromptOrText] | str | None = None,
    chat: ChatOptions | None = None,
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
    """Open what the upgrade of one adapter needs, and check it before any long work.

    Args:
        adapter: Folder or Hub id of the adapter.
        new: The new backbone.
        old: The old backbone; by default the base model of the adapter's config.
        upgrade_map: The map of the pair; by default the cached one, which is built if necessary.
        method: Name of the method.
        options: Options of the method.
        prompts: The prompts, or their name.
        chat: How conversations are rendered.
        rank: Rank of the result.
        adapter_name: Name of the adapter, if the folder has several in subfolders.
        names_result: Whether the result gets that name too; it may be any name if the folder has a single adapter.
        revision: Revision of the adapter.
        new_revision: Revision of the new backbone.
        old_revision: Revision of the old backbone.
        load: How files are downloaded and models are loaded.
        low_memory: Build the map, if necessary, with the layers of the backbones on disk.
        progress: Shows the progress.

    Raises:
        LoraSuiteError: If an input is missing or malformed, an option is invalid, or the rank is too large.
    """
    if method != "auto":
        make_options(find(method, auto=True), options)
    new_backbone = Backbone.open(new, revision=new_revision, **load.model_kwargs())
    check_rank(rank, new_backbone.arch)
    source = select_adapter(
        Source(str(adapter), "adapter", revision, **load.hub_kwargs()), adapter_name, names_result=names_result
    )
    classifies = read_config(source).get("task_type") in CLASSIFIERS
    runs = method == "auto" or find(method).needs_backbones
    if classifies and prompts is None and method != "auto" and runs:
        raise needs_texts_error(method)
    needs_old = adapter_needs_backbones(source) or prompts is not None or old is not None
    open_old = old_backbone_loader(source, old, old_revision, load.model_kwargs())

    def check_prompts(old: Backbone) -> None:
        if runs and not classifies and prompts is not None and not isinstance(prompts, str):
            _check_renders(source, old, new_backbone, prompts, chat or ChatOptions())

    pair_map, old_backbone = open_pair(
        open_old, new_backbone, upgrade_map=upgrade_map, method=method, needs_old=needs_old, check=check_prompts,
        load=load, low_memory=low_memory, progress=progress,
    )  # fmt: skip
    return UpgradeInputs(source, new_backbone, pair_map, old_backbone)


def _check_renders(
    source: Source, old: Backbone, new: Backbone, prompts: Sequence[PromptOrText], chat: ChatOptions
) -> None:
    """Raise `LoraSuiteError` if a conversation does not render on one side.

    Special tokens are left to the method: some are added to the new vocabulary for the adapter.
    """
    if talks := [one for one in prompts if isinstance(one, Conversation)]:
        ChatPair.open(
            chat, (repr(old), old.tokenizer), (repr(new), new.tokenizer), talks,
            adapter_template=read_chat_template(source), markup=False,
        )  # fmt: skip


def open_pair(
    open_old: Callable[[], Backbone],
    new: Backbone,
    *,
    upgrade_map: MapLike | None = None,
    method: str = "auto",
    needs_old: bool = False,
    check: Callable[[Backbone], None] | None = None,
    load: LoadOptions = DEFAULTS,
    low_memory: bool = False,
    progress: Progress = no_progress,
) -> tuple[UpgradeMap, Backbone | None]:
    """Return the map of a pair, and the old backbone if it is read or run.

    Without ``upgrade_map`` the old backbone is needed for the map anyway, and `auto` may run it. If it holds the same
    weights as the new one, nothing is built. With ``upgrade_map`` it is opened only if the method or something else
    (``needs_old``) reads it.

    Args:
        open_old: Opens the old backbone.
        new: The new backbone.
        upgrade_map: The map of the pair; by default the cached one, which is built if necessary.
        method: Name of the method.
        needs_old: Whether the old backbone is needed for another reason than the method: the type of the adapter, or
            because the caller passed it or prompts.
        check: Checks the prompts, given the old backbone, before a map is built.
        load: How the map is downloaded.
        low_memory: Build the map, if necessary, with the layers of the backbones on disk.
        progress: Shows the progress.
    """
    if upgrade_map is None:
        old = open_old()
        if method in ("auto", "rekey") and (found := compare_bases(old, new)).same:
            return identity_map(old, new, found), old
        if check is not None:
            check(old)
        methods = () if method == "auto" else (method,)
        return load_or_build_map(old, new, methods=methods, low_memory=low_memory, progress=progress), old
    if not isinstance(upgrade_map, UpgradeMap):
        upgrade_map = UpgradeMap.load(upgrade_map, **load.hub_kwargs())
    return upgrade_map, open_old() if needs_old or reads_old(method, upgrade_map) else None


def check_rank(rank: int | None, arch: Architecture) -> None:
    """Check that at least one module of the new backbone can have this rank."""
    if rank is None:
        return
    check_integer("rank", rank)
    most = max(min(arch.in_layer(layer).shape(part)) for layer, site in arch.modules for part in site.parts)
    if rank > most:
        raise LoraSuiteError(
            "the rank exceeds the dimensions of the modules", where="rank", got=rank, wanted=f"1 to {most}"
        )


def check_base_model(adapter: Adapter, upgrade_map: UpgradeMap) -> dict[str, str]:
    """Return a warning for the report if the adapter's base model is not the old backbone of the map.

    It is not an error, since a folder may be a copy of a repository: if one of both is a folder, only the last parts
    of the names are compared.
    """
    base = adapter.config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        return {}
    names = [public_name(re.sub(r"@[^/]*$", "", text)) for text in (base, upgrade_map.old.name)]
    names = [unquantized_name(name) or name for name in names]
    compared = names if all("/" in name for name in names) else [name.rpartition("/")[2] for name in names]
    if compared[0] == compared[1]:
        return {}
    warning = f"the adapter's base model is {names[0]}, and the map was built for {names[1]}"
    log.warning("%s: make sure that they are the same", warning)
    return {"named_base": warning}
