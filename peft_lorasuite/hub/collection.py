"""Pushing the results of a collection, each to a repository of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import LoraSuiteError
from ..io.source import split_revision
from ..upgrading.collection import Callback
from ..upgrading.upgrade import Upgraded
from .push import push_upgraded
from .repository import check_id


def assign_repositories(adapters: Iterable[str], owner: str, suffix: str = "-upgraded") -> dict[str, str]:
    """Assign a repository to the result of every adapter: ``owner/<name of the adapter><suffix>``.

    Raises:
        LoraSuiteError: If a name is not valid on the Hub, or two adapters would have the same repository.
    """
    repos: dict[str, str] = {}
    taken: dict[str, str] = {}
    for adapter in adapters:
        name = split_revision(adapter)[0].rstrip("/").rpartition("/")[2]
        repo = check_id(f"{owner}/{name}{suffix}")
        if repo in taken:
            raise LoraSuiteError(
                "two adapters would be pushed to one repository", where=repo, got=f"{taken[repo]} and {adapter}",
                do="upgrade them in two runs with different values of --suffix",
            )  # fmt: skip
        repos[adapter] = repo
        taken[repo] = adapter
    return repos


def push_each(repos: Mapping[str, str], **settings: Any) -> Callback:
    """Return a callback for `upgrade_many` that pushes each result; ``settings`` are those of `push_upgraded`."""

    def push(adapter: str, upgraded: Upgraded) -> dict[str, str]:
        pushed = push_upgraded(upgraded, repos[adapter], **settings)
        return {"repo": pushed.repo_id, "commit": pushed.commit}

    return push
