"""A repository on the Hub as it is written: looked at, changed in one commit, read back, undone if need be."""

from __future__ import annotations

import hashlib
import logging
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import LoraSuiteError
from ..io.checkpoint import open_safetensors
from ..io.retry import PAUSES, patiently, pause_for
from ..io.source import Source, hub_errors

log = logging.getLogger(__name__)

HARMLESS = (".gitattributes", ".gitignore", "README.md", "LICENSE", "LICENSE.md", "LICENSE.txt")
"""Files that say nothing of what a repository holds."""
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")


@dataclass(frozen=True)
class Pushed:
    """Where something was pushed to.

    Attributes:
        repo_id: Repository.
        commit: Commit that holds it.
        url: Address of the repository, or of the pull request.
        pull_request: Its revision (``refs/pr/N``), or None.
    """

    repo_id: str
    commit: str
    url: str
    pull_request: str | None = None


@dataclass(frozen=True)
class State:
    """What a repository holds: file -> digest (SHA-256 of a large file, git's hash of a small one)."""

    head: str
    private: bool
    files: dict[str, str]


def publish(
    folder: Path,
    repo_id: str,
    content: Sequence[str],
    stale: Sequence[str],
    *,
    private: bool | None,
    create_pr: bool,
    message: str,
    overwrite: bool,
    token: str | bool | None,
) -> Pushed:
    """Bring the files of a folder into a repository in one commit, and compare what it holds then.

    Args:
        folder: The files, and no others.
        repo_id: Repository; created if it does not exist, and removed again if nothing came of it.
        content: Files that decide whether the repository holds the same thing already.
        stale: Files that are deleted where the folder does not hold them.
        private: See `hub.push_upgraded`.
        create_pr: Propose it.
        message: Title of the commit.
        overwrite: Allow to replace something else.
        token: Hub token.
    """
    from huggingface_hub import HfApi

    place, api = Source(repo_id, "repository", token=token, hub_only=True), HfApi(token=token)
    with hub_errors(place):
        found = look(api, repo_id)
        _check_target(found, folder, content, repo_id, private=private, create_pr=create_pr, overwrite=overwrite)
        try:
            if found is None:
                patiently(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
            state = found or look(api, repo_id)
            if state is None:
                raise LoraSuiteError("the repository that was just created is gone", where=repo_id)
            if found is None:  # somebody else may have been faster
                rights = {"private": private, "create_pr": create_pr, "overwrite": overwrite}
                _check_target(state, folder, content, repo_id, **rights)
            size = sum(path.stat().st_size for path in folder.iterdir())
            log.info("pushing %d files, %.2f MB, to %s", len(list(folder.iterdir())), size / 1e6, repo_id)
            pushed = _commit(api, repo_id, state, folder, stale, message, create_pr)
            read_back(pushed, folder, token)
        except BaseException:
            if found is None:
                _remove_empty(api, repo_id)
            raise
    return pushed


def look(api: Any, repo_id: str, revision: str | None = None) -> State | None:
    """Ask what a repository holds; None where there is none that the token may see."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = patiently(lambda: api.model_info(repo_id, revision=revision, files_metadata=True))
    except RepositoryNotFoundError:
        return None
    files = {file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id for file in info.siblings or []}
    return State(info.sha, bool(info.private), files)


def check_id(repo_id: Any, *, owner: bool = True) -> str:
    """Return a Hub id as it is; refuse a path, an address, a name that the Hub does not take."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        if not isinstance(repo_id, str):  # the client takes None for no id at all
            raise HFValidationError("no text")
        validate_repo_id(repo_id)
        if owner and repo_id.count("/") != 1:
            raise HFValidationError("no owner")
    except HFValidationError:
        wanted = "owner/name of letters, digits, '-', '_' and '.', without '--' and '..'"
        raise LoraSuiteError("this is no Hub id", got=repr(repo_id), wanted=wanted) from None
    return repo_id


def check_secrets(folder: Path, token: str | bool | None) -> None:
    """Refuse to publish a token, or a path of this machine."""
    from huggingface_hub import get_token

    secrets = {text for text in (token if isinstance(token, str) else None, get_token()) if text}
    paths = {text for text in (str(Path.home()), tempfile.gettempdir(), str(Path.cwd())) if len(text) > 1}
    for path in folder.iterdir():
        data = path.read_bytes() if path.suffix in (".json", ".md") else b""
        text = data.decode("utf-8", errors="replace")
        if TOKEN.search(text) or any(secret in text for secret in secrets):
            raise LoraSuiteError("there is an access token in what would be published", where=path.name)
        if any(f"{place}/" in text or f'{place}"' in text for place in paths):
            raise LoraSuiteError(
                "there is a path of this machine in what would be published", where=path.name, do="take it out"
            )


def read_back(pushed: Pushed, folder: Path, token: str | bool | None) -> None:
    """Download what was pushed into an empty cache and compare it, tensor by tensor; a damaged download once more."""
    for last in (False, True):
        with tempfile.TemporaryDirectory() as cache:
            back = Source(pushed.repo_id, "repository", pushed.commit, token, cache, hub_only=True)
            try:
                for path in sorted(folder.iterdir()):
                    _compare(path, back.need(path.name), pushed)
                return
            except LoraSuiteError as error:
                if last or "damaged" not in error.what:
                    raise


def _check_target(
    found: State | None,
    folder: Path,
    content: Sequence[str],
    repo_id: str,
    *,
    private: bool | None,
    create_pr: bool,
    overwrite: bool,
) -> None:
    if found is None:
        if create_pr:
            raise LoraSuiteError("there is no such repository to make a pull request to", where=repo_id)
        return
    if private and not found.private:
        raise LoraSuiteError(
            "the repository is public", where=repo_id, wanted="a private one", do="choose another, or make it private"
        )
    same = all(found.files.get(name) in _digests(folder / name) for name in content)
    others = [name for name in found.files if name not in HARMLESS]
    if others and not same and not overwrite and not create_pr:
        raise LoraSuiteError(
            "the repository holds something else already", where=repo_id, got=", ".join(sorted(others)[:4]),
            do="choose another, replace it (overwrite=True, --overwrite), or propose it (create_pr=True)",
        )  # fmt: skip


def _commit(
    api: Any, repo_id: str, state: State, folder: Path, stale: Sequence[str], message: str, create_pr: bool
) -> Pushed:
    """Make the commit on top of the state that was looked at; after a lost answer, look whether it was made."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    files = {path.name: path for path in sorted(folder.iterdir())}
    gone = [name for name in stale if name in state.files and name not in files]
    for pause in (*PAUSES, None):
        operations = [CommitOperationAdd(name, path) for name, path in files.items()]
        operations += [CommitOperationDelete(name) for name in gone]
        try:
            done = api.create_commit(
                repo_id, operations, commit_message=message, parent_commit=state.head, create_pr=create_pr
            )
            return Pushed(repo_id, done.oid, done.pr_url or str(done.repo_url), done.pr_revision)
        except Exception as error:
            wait = pause_for(error, pause or 0.0)
            if wait is None:
                raise
            landed = _landed(api, repo_id, state, files, create_pr)
            if landed is not None:
                return landed
            if pause is None:
                raise
        log.info("the commit to %s was not answered, trying again in %g s", repo_id, wait)
        time.sleep(wait)
    raise LoraSuiteError("the commit was not made", where=repo_id)


def _landed(api: Any, repo_id: str, state: State, files: dict[str, Path], create_pr: bool) -> Pushed | None:
    """Find the commit whose answer was lost: on the main branch, or in a pull request."""
    places: list[str | None] = [None]
    if create_pr:
        refs = patiently(lambda: api.list_repo_refs(repo_id, include_pull_requests=True))
        places = [ref.ref for ref in reversed(refs.pull_requests or [])]
    for place in places:
        now = look(api, repo_id, place)
        if (
            now
            and now.head != state.head
            and all(now.files.get(name) in _digests(path) for name, path in files.items())
        ):
            number = place.rsplit("/", 1)[-1] if place else ""
            url = f"{api.endpoint}/{repo_id}" + (f"/discussions/{number}" if place else "")
            return Pushed(repo_id, now.head, url, place)
    return None


def _digests(path: Path) -> tuple[str, str]:
    """SHA-256 of a file, and the hash that git gives it."""
    plain, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        while piece := file.read(2**20):
            plain.update(piece)
            git.update(piece)
    return plain.hexdigest(), git.hexdigest()


def _compare(sent: Path, got: Path, pushed: Pushed) -> None:
    where = f"{pushed.repo_id} at {pushed.commit}, {sent.name}"
    if sent.suffix == ".safetensors":
        ours, theirs = open_safetensors(sent, where=sent.name), open_safetensors(got, where=where)
        names = set(ours.keys())
        odd = names ^ set(theirs.keys()) or {name for name in names if not _equal(ours, theirs, name)}
        if odd:
            raise LoraSuiteError(
                "the Hub holds other tensors than were pushed", where=where, got=", ".join(sorted(odd)[:3])
            )
    elif sent.read_bytes() != got.read_bytes():
        raise LoraSuiteError("the Hub holds another file than was pushed", where=where)


def _equal(ours: Any, theirs: Any, name: str) -> bool:
    one, other = ours.get_tensor(name), theirs.get_tensor(name)
    return one.dtype == other.dtype and torch.equal(one, other)


def _remove_empty(api: Any, repo_id: str) -> None:
    """Take back a repository that was created for a push of which nothing came."""
    try:
        state = look(api, repo_id)
        if state is not None and set(state.files) <= {".gitattributes"}:
            api.delete_repo(repo_id)
    except Exception as error:
        log.warning("the empty repository %s could not be removed (%s)", repo_id, type(error).__name__)
