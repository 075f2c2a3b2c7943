"""One map, many adapters: a collection upgraded with a journal, from which a new run goes on."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..adapters.peft_format import WEIGHTS
from ..adapters.reading import adapter_needs_backbones, read_config
from ..adapters.writing import REPORT
from ..errors import LoraSuiteError, short_message
from ..io.paths import is_folder
from ..io.source import LoadOptions, Source, hub_errors, split_revision
from ..mapping.fingerprint import check_identity, public_name
from ..mapping.upgrade_map import UpgradeMap
from ..models.backbone import Backbone
from ..models.distributed import process_index_and_count
from ..progress import Progress, no_progress
from ..text.examples import read_prompts
from .inputs import BackboneLike, MapLike, open_pair
from .journal import SETTINGS, Journal, Outcome
from .upgrade import Upgraded, upgrade

log = logging.getLogger(__name__)

Then = Callable[[str, Upgraded], Mapping[str, Any] | None]
"""What is done with each upgraded adapter after it is saved: given the old adapter's name; what it returns is noted."""


@dataclass(frozen=True)
class AdapterPlan:
    """What a run would do with one adapter: nothing where ``problem`` says why, or where it is done."""

    adapter: str
    folder: str
    done: bool
    size: int
    rank: int | None = None
    problem: str | None = None


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
    rank: int | None = None,
    seed: int = 0,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    then: Then | None = None,
    shard: tuple[int, int] | None = None,
    progress: Progress = no_progress,
) -> list[Outcome]:
    """Convert many adapters with one map; a failure is recorded, and the others go on.

    Every adapter gets a folder under ``out``, every step a line in ``out/journal.jsonl`` at once. A new run with the
    same settings keeps what is done and tries again what failed or was never reached.

    Args:
        adapters: Folders or Hub ids (``owner/name`` or ``owner/name@revision``): a list, a column of a
            `datasets.Dataset`, or a dataset with such a column.
        upgrade_map: The map of the pair, or where to load it from: loaded once. None: the cached one, built if need be.
        out: Folder of the results and of the journal.
        column: Name of the column, for a dataset.
        method: As in `upgrade`, like the next six.
        options: The method's options.
        old: The old backbone, for methods that read or run it; opened once.
        new: The new backbone, likewise.
        prompts: Unlabeled prompts, for methods that run the models: strings, records, or a file of them.
        rank: Rank of the results.
        seed: Of whatever is drawn at random.
        token: Hub token.
        cache_dir: Hub cache.
        then: Called with each result after it is saved, to push it, say; its errors count as failures.
        shard: (number, count): take every count-th adapter. By default accelerate's process index, under a launcher.
        progress: Shows how far it is.

    Returns:
        The outcomes of this process's share, in order.
    """
    load = LoadOptions(token, cache_dir)
    old, new = (None if one is None else Backbone.open(one, **load.model_kwargs()) for one in (old, new))
    upgrade_map = _open_map(upgrade_map, old, new, method, load, progress)
    folders = _folders(_names(adapters, column))
    texts = None if prompts is None else read_prompts(prompts)  # once: a generator serves all, a column is hashed whole
    can_run = method == "auto" and old is not None and new is not None
    settings = _digest(upgrade_map, method, options, rank, seed, texts, can_run)
    index, count = shard or process_index_and_count()
    journal = Journal(Path(out).expanduser(), index, count)

    def one(name: str) -> dict[str, Any]:
        start, (place, revision) = time.perf_counter(), split_revision(name)
        upgraded = upgrade(
            place, upgrade_map, method=method, options=options, old=old, new=new, prompts=texts, rank=rank, seed=seed,
            revision=revision, token=token, cache_dir=cache_dir,
        )  # fmt: skip
        upgraded = replace(
            upgraded, report=replace(upgraded.report, facts={**upgraded.report.facts, SETTINGS: settings})
        )
        target = journal.out / folders[name]
        upgraded.save(target, overwrite=(target / REPORT).is_file())
        extra = dict(then(name, upgraded) or {}) if then else {}
        return {**_told(upgraded), "seconds": round(time.perf_counter() - start, 2), **extra}

    outcomes = []
    for name in progress("upgrading", list(folders)[index::count]):
        outcome = journal.done(name, settings, folders[name])
        if outcome is None:
            outcome = _attempt(one, name, folders[name], settings)
            journal.write(outcome)
        outcomes.append(outcome)
    return outcomes


def _open_map(
    upgrade_map: MapLike | None, old: Backbone | None, new: Backbone | None, method: str, load: LoadOptions,
    progress: Progress,
) -> UpgradeMap:  # fmt: skip
    """Open the map, and check before the first adapter that the backbones are the map's."""
    if upgrade_map is None:
        if old is None or new is None:
            raise LoraSuiteError("building the upgrade map needs both backbones", do="pass old= and new=, or a map")
        return open_pair(lambda: old, new, method=method, load=load, progress=progress)[0]
    if not isinstance(upgrade_map, UpgradeMap):
        upgrade_map = UpgradeMap.load(upgrade_map, **load.hub_kwargs())
    for role, backbone in (("old", old), ("new", new)):
        if backbone is not None:
            check_identity(getattr(upgrade_map, role), backbone, role)
    return upgrade_map


def open_collection(
    adapters: Iterable[str],
    old: BackboneLike,
    new: BackboneLike,
    *,
    upgrade_map: MapLike | None = None,
    method: str = "auto",
    progress: Progress = no_progress,
) -> tuple[UpgradeMap, Backbone | None]:
    """Return the map for a list of adapters, and the old backbone if one of the upgrades needs it.

    As `open_pair`, where ``reads`` follows from the adapters: with a map, their weights are fetched to see their types.
    """
    reads = upgrade_map is not None and any(_reads_backbones(name) for name in adapters)
    return open_pair(
        lambda: Backbone.open(old), Backbone.open(new), upgrade_map=upgrade_map, method=method, reads=reads,
        progress=progress,
    )  # fmt: skip


def _reads_backbones(name: str) -> bool:
    """Return whether an adapter needs both backbones; what is wrong with it is reported when it is upgraded."""
    try:
        place, revision = split_revision(name)
        return adapter_needs_backbones(Source(place, "adapter", revision))
    except LoraSuiteError:
        return False


def plan_many(
    adapters: Iterable[Any],
    out: str | Path,
    *,
    base: str | None = None,
    column: str = "adapter",
    token: str | bool | None = None,
    cache_dir: str | None = None,
) -> list[AdapterPlan]:
    """Look at every adapter's config, and at nothing larger, and say what `upgrade_many` would do.

    Args:
        adapters: As in `upgrade_many`.
        out: Likewise.
        base: The old backbone that every adapter has to name.
        column: As in `upgrade_many`.
        token: Hub token.
        cache_dir: Hub cache.
    """
    journal = Journal(Path(out).expanduser(), 0, 1)
    planned = []
    for name, folder in _folders(_names(adapters, column)).items():
        try:
            place, revision = split_revision(name)
            source = Source(place, "adapter", revision, token, cache_dir)
            config = read_config(source)
            named = config.get("base_model_name_or_path")
            problem = None if base is None or _same(base, named) else f"its backbone is {public_name(str(named))}"
            size = _size(source)
        except LoraSuiteError as error:
            config, problem, size = {}, str(error), 0
        done = journal.done(name, None, folder) is not None
        planned.append(AdapterPlan(name, folder, done, size, config.get("r"), problem))
    return planned


def _same(base: str, named: object) -> bool:
    """Whether an adapter's config names a backbone: by its name, or by another path to its folder."""
    if base == named or not isinstance(named, str):
        return base == named
    return is_folder(base) and is_folder(named) and Path(base).expanduser().samefile(Path(named).expanduser())


def find_adapters(author: str, base: str, *, token: str | bool | None = None) -> list[str]:
    """List the adapters of a user or organization whose card names a backbone."""
    from huggingface_hub import HfApi

    from ..io.retry import with_retries

    with hub_errors(Source(author, "user", token=token, hub_only=True)):
        models = with_retries(
            lambda: list(HfApi(token=token).list_models(author=author, filter=f"base_model:adapter:{base}"))
        )
    return sorted(model.id for model in models)


def read_names(path: str | Path) -> list[str]:
    """Read a text file with one adapter per line; ``#`` starts a comment."""
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise LoraSuiteError(
            f"the list cannot be read: {short_message(error)}", where=path, wanted="text in UTF-8"
        ) from error
    return [name for line in lines if (name := line.partition("#")[0].strip())]


def _attempt(work: Callable[[str], dict[str, Any]], name: str, folder: str, settings: str) -> Outcome:
    try:
        facts = work(name)
    except LoraSuiteError as error:
        log.warning("%s: %s", name, error)
        return Outcome(name, "failed", folder, str(error), {}, settings)
    except Exception as error:  # one broken adapter must not end the run over a hundred others
        log.exception("%s", name)
        return Outcome(name, "failed", folder, f"{type(error).__name__}: {error}", {}, settings)
    return Outcome(name, "done", folder, None, facts, settings)


def _names(adapters: Iterable[Any], column: str) -> list[str]:
    if isinstance(adapters, (str, bytes, os.PathLike, Mapping)):
        raise LoraSuiteError(
            "the adapters are no list", got=repr(adapters), wanted="a list of names, or a dataset",
            do="put a single adapter in brackets",
        )  # fmt: skip
    names = []
    for row in adapters:
        if isinstance(row, Mapping) and column not in row:
            raise LoraSuiteError("the dataset has no such column", got=repr(column), wanted=", ".join(map(str, row)))
        names.append(str(row[column] if isinstance(row, Mapping) else row))
    return names


def _folders(names: Sequence[str]) -> dict[str, str]:
    """Give every adapter a folder name of its own."""
    plain = {name: re.sub(r"[^\w.-]+", "__", public_name(name)).lstrip(".") or "adapter" for name in names}
    taken = list(plain.values())
    return {
        name: slug if taken.count(slug) == 1 else f"{slug}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        for name, slug in plain.items()
    }


def _digest(upgrade_map: UpgradeMap, *settings: Any) -> str:
    text = repr((upgrade_map.old.key, upgrade_map.new.key, upgrade_map.options, *settings))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _told(upgraded: Upgraded) -> dict[str, Any]:
    report = upgraded.report
    return {
        "method": report.method["name"],
        "rank": report.rank,
        "coverage": round(report.coverage, 4),
        "energy_kept": round(report.energy_kept, 4),
        "revision": report.revisions.get("adapter"),
    }


def _size(source: Source) -> int:
    if source.folder is not None:
        path = source.folder / WEIGHTS
        return path.stat().st_size if path.is_file() else 0
    return source.listing.get(WEIGHTS, (0, None))[0]
