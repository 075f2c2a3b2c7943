"""`upgrade_many`: convert many adapters with one map, with a journal from which a new run continues."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..adapters.reading import adapter_needs_backbones
from ..adapters.writing import REPORT
from ..errors import LoraSuiteError
from ..io.source import LoadOptions, Source, split_revision
from ..io.temporary import remove_leftovers
from ..mapping.fingerprint import check_identity
from ..mapping.upgrade_map import UpgradeMap
from ..models.backbone import Backbone
from ..models.distributed import process_index_and_count
from ..models.task import LabelsLike
from ..progress import Progress, no_progress
from ..text.chat_options import ChatLike, ChatOptions
from ..text.examples import given_prompts
from .adapter_list import assign_folders, list_names
from .inputs import BackboneLike, MapLike, open_pair
from .journal import SETTINGS, Journal, Outcome
from .upgrade import Upgraded, upgrade

log = logging.getLogger(__name__)

Callback = Callable[[str, Upgraded], Mapping[str, Any] | None]
"""Called with the name of the old adapter and the saved result; returns facts for the journal."""


def upgrade_many(
    adapters: Iterable[Any],
    upgrade_map: MapLike | None,
    out: str | Path,
    *,
    column: str = "adapter",
    method: str = "auto",
    options: Any = None,
    old: Any = None,
    new: Any = None,
    prompts: Any = None,
    chat: ChatLike = None,
    rank: int | None = None,
    labels: LabelsLike | None = None,
    problem_type: str | None = None,
    seed: int = 0,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    then: Callback | None = None,
    shard: tuple[int, int] | None = None,
    progress: Progress = no_progress,
) -> list[Outcome]:
    """Convert many adapters with one map. A failure is recorded, and the run continues.

    Every adapter gets a folder under ``out`` and a line in ``out/journal.jsonl``. A new run with the same settings
    skips what is done, and tries again what failed.

    Args:
        adapters: Folders or Hub ids (``owner/name`` or ``owner/name@revision``): a list, a column of a
            `datasets.Dataset`, or a dataset with such a column.
        upgrade_map: The map of the pair, or its folder or Hub id. None: the cached one, which is built if necessary.
        out: Folder of the results and the journal.
        column: Name of the column, for a dataset.
        method: As in `upgrade`.
        options: As in `upgrade`.
        old: The old backbone, for methods that read or run it; opened once.
        new: The new backbone, for methods that read or run it; opened once.
        prompts: As in `upgrade`; read once.
        chat: As in `upgrade`.
        rank: Rank of the results.
        labels: As in `upgrade`, the same for all adapters; by default those of files beside each of them.
        problem_type: As in `upgrade`, likewise.
        seed: As in `upgrade`.
        token: Hub token.
        cache_dir: Hub cache.
        then: Called after each result is saved, for example to push it. An error in it counts as a failure.
        shard: ``(index, count)``: take every ``count``-th adapter. By default the process index of accelerate.
        progress: Shows the progress.

    Returns:
        The outcomes of this process's adapters, in order.

    Raises:
        LoraSuiteError: If the map, a backbone, the prompts or the list of adapters is missing or malformed.
    """
    load, chat = LoadOptions(token, cache_dir), ChatOptions.of(chat)
    old, new = (None if one is None else Backbone.open(one, **load.model_kwargs()) for one in (old, new))
    upgrade_map = _open_map(upgrade_map, old, new, method, load, progress)
    folders = assign_folders(list_names(adapters, column))
    # read once: they may be a generator
    texts = given_prompts(prompts, options=options, seed=seed, form=chat.prompt_format, token=token)
    can_run = method == "auto" and old is not None and new is not None
    settings = _digest(
        upgrade_map, method, options, rank, seed, texts, can_run, *([chat] if chat != ChatOptions() else []),
        *([labels, problem_type] if labels is not None or problem_type is not None else []),
    )  # fmt: skip
    index, count = shard or process_index_and_count()
    journal = Journal(Path(out).expanduser(), index, count)
    remove_leftovers(journal.out)

    def convert(name: str) -> dict[str, Any]:
        start, (repo, revision) = time.perf_counter(), split_revision(name)
        upgraded = upgrade(
            repo, upgrade_map, method=method, options=options, old=old, new=new, prompts=texts, chat=chat, rank=rank,
            labels=labels, problem_type=problem_type, seed=seed, revision=revision, token=token, cache_dir=cache_dir,
        )  # fmt: skip
        facts = {**upgraded.report.facts, SETTINGS: settings}
        upgraded = replace(upgraded, report=replace(upgraded.report, facts=facts))
        target = journal.out / folders[name]
        upgraded.save(target, overwrite=(target / REPORT).is_file())
        extra = dict(then(name, upgraded) or {}) if then else {}
        return {**_journal_facts(upgraded), "seconds": round(time.perf_counter() - start, 2), **extra}

    outcomes = []
    for name in progress("upgrading", list(folders)[index::count]):
        outcome = journal.done(name, settings, folders[name])
        if outcome is None:
            outcome = _run_one(convert, name, folders[name], settings)
            journal.write(outcome)
        outcomes.append(outcome)
    return outcomes


def _open_map(
    upgrade_map: MapLike | None, old: Backbone | None, new: Backbone | None, method: str, load: LoadOptions,
    progress: Progress,
) -> UpgradeMap:  # fmt: skip
    """Open the map, and check that the backbones are those of the map."""
    if upgrade_map is None:
        if old is None or new is None:
            raise LoraSuiteError("building the upgrade map needs both backbones", do="pass old= and new=, or a map")
        return open_pair(lambda: old, new, method=method, load=load, progress=progress)[0]
    if not isinstance(upgrade_map, UpgradeMap):
        upgrade_map = UpgradeMap.load(upgrade_map, **load.hub_kwargs())
    for role, backbone in (("old", old), ("new", new)):
        check_identity(getattr(upgrade_map, role), backbone, role)
    return upgrade_map


def open_collection(
    adapters: Iterable[str],
    old: BackboneLike,
    new: BackboneLike,
    *,
    upgrade_map: MapLike | None = None,
    method: str = "auto",
    prompts: bool = False,
    progress: Progress = no_progress,
) -> tuple[UpgradeMap, Backbone | None]:
    """Return the map for a list of adapters, and the old backbone if one of the upgrades needs it; see `open_pair`.

    With ``upgrade_map`` the weights of the adapters are downloaded, to read their types. ``prompts`` tells whether
    there are any.
    """
    needs_old = prompts or (upgrade_map is not None and any(_needs_backbones(name) for name in adapters))
    return open_pair(
        lambda: Backbone.open(old), Backbone.open(new), upgrade_map=upgrade_map, method=method, needs_old=needs_old,
        progress=progress,
    )  # fmt: skip


def upgrade_collection(
    adapters: Iterable[str],
    old: BackboneLike,
    new: BackboneLike,
    out: str | Path,
    *,
    upgrade_map: MapLike | None = None,
    method: str = "auto",
    prompts: Any = None,
    chat: ChatLike = None,
    then: Callback | None = None,
    progress: Progress = no_progress,
) -> list[Outcome]:
    """Convert a list of adapters with `upgrade_many`; the old backbone is opened only if it is needed.

    Args:
        adapters: As in `upgrade_many`.
        old: The old backbone of all adapters.
        new: The new backbone.
        out: As in `upgrade_many`.
        upgrade_map: As in `upgrade_many`.
        method: As in `upgrade_many`.
        prompts: As in `upgrade_many`.
        chat: As in `upgrade_many`.
        then: As in `upgrade_many`.
        progress: Shows the progress.
    """
    adapters = list(adapters)
    if not adapters:
        return []
    new = Backbone.open(new)
    upgrade_map, old_backbone = open_collection(
        adapters, old, new, upgrade_map=upgrade_map, method=method, prompts=prompts is not None, progress=progress
    )
    return upgrade_many(
        adapters, upgrade_map, out, method=method, old=old_backbone, new=new, prompts=prompts, chat=chat, then=then,
        progress=progress,
    )  # fmt: skip


def _needs_backbones(name: str) -> bool:
    """Return whether an adapter needs both backbones; its errors are reported when it is upgraded."""
    try:
        repo, revision = split_revision(name)
        return adapter_needs_backbones(Source(repo, "adapter", revision))
    except LoraSuiteError:
        return False


def _run_one(convert: Callable[[str], dict[str, Any]], name: str, folder: str, settings: str) -> Outcome:
    try:
        facts = convert(name)
    except LoraSuiteError as error:
        log.warning("%s: %s", name, error)
        return Outcome(name, "failed", folder, str(error), {}, settings)
    except Exception as error:  # one broken adapter must not end the run over a hundred others
        log.exception("%s", name)
        return Outcome(name, "failed", folder, f"{type(error).__name__}: {error}", {}, settings)
    return Outcome(name, "done", folder, None, facts, settings)


def _digest(upgrade_map: UpgradeMap, *settings: Any) -> str:
    text = repr((upgrade_map.old.key, upgrade_map.new.key, upgrade_map.options, *settings))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _journal_facts(upgraded: Upgraded) -> dict[str, Any]:
    report = upgraded.report
    return {
        "method": report.method["name"],
        "rank": report.rank,
        "verdict": report.verdict,
        "coverage": None if report.coverage is None else round(report.coverage, 4),
        "energy_kept": round(report.energy_kept, 4),
        "revision": report.revisions.get("adapter"),
    }
