"""Lists of adapters: read from a file or a dataset, found on the Hub, and planned before a run."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapters.peft_format import WEIGHTS
from ..adapters.reading import read_config
from ..errors import LoraSuiteError, short_message
from ..io.paths import is_folder
from ..io.retry import with_retries
from ..io.source import Source, hub_errors, split_revision
from ..mapping.fingerprint import public_name
from .journal import Journal


@dataclass(frozen=True)
class AdapterPlan:
    """What a run would do with one adapter.

    Attributes:
        adapter: The old adapter as it was given.
        folder: Name of its folder under ``out``.
        done: Whether an earlier run has done it.
        size: Size of its weights in bytes; 0 if it is not known.
        rank: Its rank.
        problem: Why it cannot be upgraded; None if no problem was found.
    """

    adapter: str
    folder: str
    done: bool
    size: int
    rank: int | None = None
    problem: str | None = None

    def describe(self, out: str | Path, repo: str | None = None) -> str:
        """Return on one line what would be done, and the repository that the result would be pushed to."""
        if self.problem:
            return f"skip     {self.adapter}: {self.problem}"
        action = "done   " if self.done else "upgrade"
        line = f"{action}  {self.adapter} (rank {self.rank}, {self.size / 1e6:.2f} MB) -> {out}/{self.folder}"
        return f"{line} and {repo}" if repo else line


def plan_many(
    adapters: Iterable[Any],
    out: str | Path,
    *,
    base: str | None = None,
    column: str = "adapter",
    token: str | bool | None = None,
    cache_dir: str | None = None,
) -> list[AdapterPlan]:
    """Return what `upgrade_many` would do, from the configs of the adapters; nothing larger is downloaded.

    Args:
        adapters: As in `upgrade_many`.
        out: As in `upgrade_many`.
        base: The old backbone; an adapter with another base model is a problem.
        column: As in `upgrade_many`.
        token: Hub token.
        cache_dir: Hub cache.
    """
    journal = Journal(Path(out).expanduser(), 0, 1)
    plans = []
    for name, folder in assign_folders(list_names(adapters, column)).items():
        try:
            repo, revision = split_revision(name)
            source = Source(repo, "adapter", revision, token, cache_dir)
            config = read_config(source)
            own_base = config.get("base_model_name_or_path")
            matches = base is None or _is_same_base(base, own_base)
            problem = None if matches else f"its base model is {public_name(str(own_base))}"
            size = _weights_size(source)
        except LoraSuiteError as error:
            config, problem, size = {}, str(error), 0
        done = journal.done(name, None, folder) is not None
        plans.append(AdapterPlan(name, folder, done, size, config.get("r"), problem))
    return plans


def _is_same_base(base: str, other: object) -> bool:
    """Whether two base models have the same name, or are paths to the same folder."""
    if base == other or not isinstance(other, str):
        return base == other
    return is_folder(base) and is_folder(other) and Path(base).expanduser().samefile(Path(other).expanduser())


def _weights_size(source: Source) -> int:
    if source.folder is not None:
        path = source.folder / WEIGHTS
        return path.stat().st_size if path.is_file() else 0
    return source.listing.get(WEIGHTS, (0, None))[0]


def find_adapters(author: str, base: str, *, token: str | bool | None = None) -> list[str]:
    """Return the adapters of a user or organization on the Hub whose card has ``base`` as base model."""
    from huggingface_hub import HfApi

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


def list_names(adapters: Iterable[Any], column: str) -> list[str]:
    """Return the adapters of a list, or of a column of a dataset.

    Raises:
        LoraSuiteError: If it is a single name, or the dataset has no such column.
    """
    if isinstance(adapters, (str, bytes, os.PathLike, Mapping)):
        raise LoraSuiteError(
            "adapters must be a list of names, or a dataset", got=repr(adapters), do="put a single adapter in a list",
        )  # fmt: skip
    names = []
    for row in adapters:
        if isinstance(row, Mapping) and column not in row:
            raise LoraSuiteError("the dataset has no such column", got=repr(column), wanted=", ".join(map(str, row)))
        names.append(str(row[column] if isinstance(row, Mapping) else row))
    return names


def assign_folders(names: Sequence[str]) -> dict[str, str]:
    """Assign a unique folder name to every adapter."""
    slugs = {name: re.sub(r"[^\w.-]+", "__", public_name(name)).lstrip(".") or "adapter" for name in names}
    taken = list(slugs.values())
    return {
        name: slug if taken.count(slug) == 1 else f"{slug}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        for name, slug in slugs.items()
    }
