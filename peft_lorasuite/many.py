"""One map, many adapters: a collection upgraded with a journal, from which a new run goes on."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .adapter import WEIGHTS, read_config
from .backbone import Backbone
from .errors import LoraSuiteError
from .identity import public_name
from .processes import number_and_count
from .progress import Progress, silent
from .source import Source, hub_errors, name_and_revision, read_json
from .upgrade_map import UpgradeMap
from .upgrading import REPORT, Upgraded, upgrade

log = logging.getLogger(__name__)

JOURNAL = "journal"
SETTINGS = "collection_settings"
"""Fact of a result's report: the digest of map and settings that it was made with."""
Then = Callable[[str, Upgraded], Mapping[str, Any] | None]
"""What is done with each upgraded adapter after it is saved: given the old adapter's name; what it returns is noted."""


@dataclass(frozen=True)
class Outcome:
    """What became of one adapter; a line of the journal.

    Attributes:
        adapter: The old adapter as it was named.
        status: ``"done"``, ``"failed"``, or ``"kept"``: done by an earlier run.
        folder: Its folder under ``out``.
        error: Why it failed, in one sentence.
        facts: Method, rank, coverage, energy kept, seconds, and what ``then`` returned.
        settings: Digest of map and settings: a run with others does not take this for done.
    """

    adapter: str
    status: str
    folder: str
    error: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    settings: str = ""


@dataclass(frozen=True)
class Planned:
    """What a run would do with one adapter: nothing where ``problem`` says why, or where it is done."""

    adapter: str
    folder: str
    done: bool
    size: int
    rank: int | None = None
    problem: str | None = None


def upgrade_many(
    adapters: Iterable[Any],
    upgrade_map: UpgradeMap | str | Path,
    out: str | Path,
    *,
    column: str = "adapter",
    method: str = "auto",
    options: Any = None,
    old: Any = None,
    new: Any = None,
    prompts: Sequence[str] | None = None,
    rank: int | None = None,
    seed: int = 0,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    then: Then | None = None,
    shard: tuple[int, int] | None = None,
    progress: Progress = silent,
) -> list[Outcome]:
    """Carry many adapters over with one map; a failure is noted, and the others go on.

    Every adapter gets a folder under ``out``, every step a line in ``out/journal.jsonl`` at once. A new run with the
    same settings keeps what is done and tries again what failed or was never reached.

    Args:
        adapters: Folders or Hub ids (``owner/name`` or ``owner/name@revision``): a list, a column of a
            `datasets.Dataset`, or a dataset with such a column.
        upgrade_map: The map of the pair, or where to load it from: loaded once.
        out: Folder of the results and of the journal.
        column: Name of the column, for a dataset.
        method: As in `upgrade`, like the next six.
        options: The method's options.
        old: The old backbone, for methods that read or run it; opened once.
        new: The new backbone, likewise.
        prompts: Unlabelled prompts, for methods that run the models.
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
    if not isinstance(upgrade_map, UpgradeMap):
        upgrade_map = UpgradeMap.load(upgrade_map, token=token, cache_dir=cache_dir)
    folders = _folders(_names(adapters, column))
    texts = None if prompts is None else [str(prompt) for prompt in prompts]  # a column's repr shows a few only
    can_run = method == "auto" and old is not None and new is not None
    settings = _digest(upgrade_map, method, options, rank, seed, texts, can_run)
    old, new = (None if one is None else Backbone.open(one, token=token, cache_dir=cache_dir) for one in (old, new))
    index, count = shard or number_and_count()
    journal = _Journal(Path(out).expanduser(), index, count)

    def one(name: str) -> dict[str, Any]:
        start, (place, revision) = time.perf_counter(), name_and_revision(name)
        carried = upgrade(
            place, upgrade_map, method=method, options=options, old=old, new=new, prompts=prompts, rank=rank, seed=seed,
            revision=revision, token=token, cache_dir=cache_dir,
        )  # fmt: skip
        carried = replace(carried, report=replace(carried.report, facts={**carried.report.facts, SETTINGS: settings}))
        target = journal.out / folders[name]
        carried.save(target, overwrite=(target / REPORT).is_file())
        extra = dict(then(name, carried) or {}) if then else {}
        return {**_told(carried), "seconds": round(time.perf_counter() - start, 2), **extra}

    outcomes = []
    for name in progress("upgrading", list(folders)[index::count]):
        outcome = journal.done(name, settings, folders[name])
        if outcome is None:
            outcome = _attempt(one, name, folders[name], settings)
            journal.write(outcome)
        outcomes.append(outcome)
    return outcomes


def plan_many(
    adapters: Iterable[Any],
    out: str | Path,
    *,
    base: str | None = None,
    column: str = "adapter",
    token: str | bool | None = None,
    cache_dir: str | None = None,
) -> list[Planned]:
    """Look at every adapter's config, and at nothing larger, and say what `upgrade_many` would do.

    Args:
        adapters: As in `upgrade_many`.
        out: Likewise.
        base: The old backbone that every adapter has to name.
        column: As in `upgrade_many`.
        token: Hub token.
        cache_dir: Hub cache.
    """
    journal = _Journal(Path(out).expanduser(), 0, 1)
    planned = []
    for name, folder in _folders(_names(adapters, column)).items():
        place, revision = name_and_revision(name)
        source = Source(place, "adapter", revision, token, cache_dir)
        try:
            config = read_config(source)
            named = config.get("base_model_name_or_path")
            problem = None if base in (None, named) else f"its backbone is {public_name(str(named))}"
            size = _size(source)
        except LoraSuiteError as error:
            config, problem, size = {}, str(error), 0
        done = journal.done(name, None, folder) is not None
        planned.append(Planned(name, folder, done, size, config.get("r"), problem))
    return planned


def find_adapters(author: str, base: str, *, token: str | bool | None = None) -> list[str]:
    """List the adapters of a user or organisation whose card names a backbone."""
    from huggingface_hub import HfApi

    from .retry import patiently

    with hub_errors(Source(author, "user", token=token, hub_only=True)):
        models = patiently(
            lambda: list(HfApi(token=token).list_models(author=author, filter=f"base_model:adapter:{base}"))
        )
    return sorted(model.id for model in models)


class _Journal:
    """Lines of JSON, one an outcome, appended as they come; one file a process, all of them read."""

    def __init__(self, out: Path, index: int, count: int) -> None:
        self.out = out
        self.path = out / (f"{JOURNAL}.jsonl" if count == 1 else f"{JOURNAL}-{index}.jsonl")
        self.known: dict[tuple[str, str], Outcome] = {}
        for path in sorted(out.glob(f"{JOURNAL}*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = Outcome(**json.loads(line))
                    self.known[entry.adapter, entry.settings] = entry
                except (ValueError, TypeError):
                    log.warning("a line of %s cannot be read, as after a crash: that adapter is done again", path.name)

    def done(self, name: str, settings: str | None, folder: str) -> Outcome | None:
        """Return what an earlier run did; None if nothing, with other settings, or if it is no longer there.

        The result itself says with what settings it was made: the files of several runs and shards have no order.
        """
        held = self._held(folder)
        entry = self.known.get((name, held))
        if entry is None or entry.status != "done" or entry.folder != folder:
            return None
        if settings not in (None, held) or not (self.out / folder / WEIGHTS).is_file():
            return None
        return Outcome(name, "kept", folder, None, entry.facts, entry.settings)

    def _held(self, folder: str) -> str:
        try:
            return str(read_json(self.out / folder / REPORT, where=folder)["facts"][SETTINGS])
        except (LoraSuiteError, KeyError, TypeError):  # no result, or none that says it
            return ""

    def write(self, outcome: Outcome) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        line = json.dumps(asdict(outcome), ensure_ascii=False)
        broken = self.path.is_file() and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if broken else "") + line + "\n")
            file.flush()
            os.fsync(file.fileno())


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


def _told(carried: Upgraded) -> dict[str, Any]:
    report = carried.report
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
