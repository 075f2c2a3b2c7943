"""Write to a repository on the Hub: check its content, commit once, verify the result, undo on failure."""

from __future__ import annotations

import hashlib
import logging
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import LoraSuiteError
from ..io.checkpoint import open_safetensors
from ..io.retry import PAUSES, retry_delay, with_retries
from ..io.source import Source, hub_errors
from ..io.temporary import temporary_folder

if TYPE_CHECKING:
    from huggingface_hub import HfApi

log = logging.getLogger(__name__)

IGNORED = (".gitattributes", ".gitignore", "README.md", "LICENSE", "LICENSE.md", "LICENSE.txt")
"""Files that do not count as other content of a repository."""
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")


@dataclass(frozen=True)
class Pushed:
    """Result of a push.

    Attributes:
        repo_id: Repository.
        commit: Commit with the pushed files.
        url: URL of the repository, or of the pull request.
        pull_request: Revision of the pull request (``refs/pr/N``), or None.
    """

    repo_id: str
    commit: str
    url: str
    pull_request: str | None = None


@dataclass(frozen=True)
class RepoState:
    """Content of a repository: file -> digest (SHA-256 of an LFS file, git blob hash of a regular one)."""

    head: str
    private: bool
    files: dict[str, str | None]


def publish(
    folder: Path,
    repo_id: str,
    key_files: Sequence[str],
    stale: Sequence[str],
    *,
    private: bool | None,
    create_pr: bool,
    message: str,
    overwrite: bool,
    token: str | bool | None,
) -> Pushed:
    """Push the files of a folder to a repository in one commit, and verify what the repository has afterwards.

    Args:
        folder: The files to push.
        repo_id: Repository; created if it does not exist, and deleted again if the push fails.
        key_files: Files that decide whether the repository has the same content already.
        stale: Files to delete if the folder does not have them.
        private: As in `push_upgraded`.
        create_pr: As in `push_upgraded`.
        message: Title of the commit.
        overwrite: As in `push_upgraded`.
        token: Hub token.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    check_target = partial(
        _check_target, folder=folder, key_files=key_files, repo_id=repo_id,
        private=private, create_pr=create_pr, overwrite=overwrite,
    )  # fmt: skip
    with hub_errors(Source(repo_id, "repository", token=token, hub_only=True)):
        existing = read_state(api, repo_id)
        check_target(existing)
        try:
            state = existing or _create_repo(api, repo_id, private)
            if existing is None:  # another process may have created it in the meantime, with other content
                check_target(state)
            sizes = [path.stat().st_size for path in folder.iterdir()]
            log.info("pushing %d files, %.2f MB, to %s", len(sizes), sum(sizes) / 1e6, repo_id)
            pushed = _commit(api, repo_id, state, folder, stale, message, create_pr)
            verify(pushed, folder, token)
        except BaseException:
            if existing is None:
                _delete_empty_repo(api, repo_id)
            raise
    return pushed


def read_state(api: HfApi, repo_id: str, revision: str | None = None) -> RepoState | None:
    """Read the content of a repository; None if the token has no access to such a repository."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = with_retries(lambda: api.model_info(repo_id, revision=revision, files_metadata=True))
    except RepositoryNotFoundError:
        return None
    files = {file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id for file in info.siblings or []}
    return RepoState(str(info.sha), bool(info.private), files)


def check_id(repo_id: Any, *, owner: bool = True) -> str:
    """Return a Hub id unchanged; raise for a path, a URL or a name that the Hub does not allow."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        if not isinstance(repo_id, str):  # the validation of huggingface_hub accepts None
            raise HFValidationError("must be a string")
        validate_repo_id(repo_id)
        if owner and repo_id.count("/") != 1:
            raise HFValidationError("must have an owner")
    except HFValidationError:
        wanted = "owner/name of letters, digits, '-', '_' and '.', without '--' and '..'"
        raise LoraSuiteError("not a valid Hub id", got=repr(repo_id), wanted=wanted) from None
    return repo_id


def check_secrets(folder: Path, token: str | bool | None) -> None:
    """Raise if a file to be pushed has an access token or a local path in it."""
    from huggingface_hub import get_token

    secrets = {text for text in (token if isinstance(token, str) else None, get_token()) if text}
    paths = {text for text in (str(Path.home()), tempfile.gettempdir(), str(Path.cwd())) if len(text) > 1}
    for path in folder.iterdir():
        data = path.read_bytes() if path.suffix in (".json", ".md") else b""
        text = data.decode("utf-8", errors="replace")
        if TOKEN.search(text) or any(secret in text for secret in secrets):
            raise LoraSuiteError("the file to be pushed has an access token in it", where=path.name)
        if any(f"{place}/" in text or f'{place}"' in text for place in paths):
            raise LoraSuiteError("the file to be pushed has a local path in it", where=path.name, do="remove the path")


def verify(pushed: Pushed, folder: Path, token: str | bool | None) -> None:
    """Download what was pushed to an empty cache and compare it; a damaged download is tried a second time."""
    for last in (False, True):
        with temporary_folder() as cache:
            remote = Source(pushed.repo_id, "repository", pushed.commit, token, str(cache), hub_only=True)
            try:
                for path in sorted(folder.iterdir()):
                    _compare(path, remote.require(path.name), pushed)
                return
            except LoraSuiteError as error:
                if last or "damaged" not in error.what:
                    raise


def _check_target(
    state: RepoState | None,
    *,
    folder: Path,
    key_files: Sequence[str],
    repo_id: str,
    private: bool | None,
    create_pr: bool,
    overwrite: bool,
) -> None:
    if state is None:
        if create_pr:
            raise LoraSuiteError("the repository does not exist, so it cannot have a pull request", where=repo_id)
        return
    if private and not state.private:
        raise LoraSuiteError(
            "the repository is public", where=repo_id, wanted="a private one", do="choose another, or make it private"
        )
    same = all(state.files.get(name) in _digests(folder / name) for name in key_files)
    others = sorted(name for name in state.files if name not in IGNORED)
    if others and not same and not overwrite and not create_pr:
        raise LoraSuiteError(
            "the repository has other content already", where=repo_id, got=", ".join(others[:4]),
            do="choose another, replace it (overwrite=True, --overwrite), or open a pull request (create_pr=True)",
        )  # fmt: skip


def _create_repo(api: HfApi, repo_id: str, private: bool | None) -> RepoState:
    with_retries(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
    state = read_state(api, repo_id)
    if state is None:
        raise LoraSuiteError("the repository was just created and cannot be found", where=repo_id)
    return state


def _commit(
    api: HfApi, repo_id: str, state: RepoState, folder: Path, stale: Sequence[str], message: str, create_pr: bool
) -> Pushed:
    """Commit on top of the state that was checked; if the response is lost, check whether the commit exists."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    files = {path.name: path for path in sorted(folder.iterdir())}
    deleted = [name for name in stale if name in state.files and name not in files]
    for pause in (*PAUSES, None):
        operations = [CommitOperationAdd(name, path) for name, path in files.items()]
        operations += [CommitOperationDelete(name) for name in deleted]
        try:
            info = api.create_commit(
                repo_id, operations, commit_message=message, parent_commit=state.head, create_pr=create_pr
            )
            return Pushed(repo_id, info.oid, info.pr_url or str(info.repo_url), info.pr_revision)
        except Exception as error:
            wait = retry_delay(error, pause or 0.0)
            if wait is None:
                raise
            pushed = _find_commit(api, repo_id, state, files, create_pr)
            if pushed is not None:
                return pushed
            if pause is None:
                raise
        log.info("no response to the commit to %s, retrying in %g s", repo_id, wait)
        time.sleep(wait)
    raise LoraSuiteError("the commit failed", where=repo_id)


def _find_commit(api: HfApi, repo_id: str, before: RepoState, files: dict[str, Path], create_pr: bool) -> Pushed | None:
    """Find the commit whose response was lost: on the main branch, or in a pull request."""
    revisions: list[str | None] = [None]
    if create_pr:
        refs = with_retries(lambda: api.list_repo_refs(repo_id, include_pull_requests=True))
        revisions = [ref.ref for ref in reversed(refs.pull_requests or [])]
    for revision in revisions:
        now = read_state(api, repo_id, revision)
        if now is None or now.head == before.head:
            continue
        if all(now.files.get(name) in _digests(path) for name, path in files.items()):
            number = revision.rsplit("/", 1)[-1] if revision else ""
            url = f"{api.endpoint}/{repo_id}" + (f"/discussions/{number}" if revision else "")
            return Pushed(repo_id, now.head, url, revision)
    return None


def _digests(path: Path) -> tuple[str, str]:
    """Return the SHA-256 of a file and its git blob hash."""
    sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            sha256.update(chunk)
            git.update(chunk)
    return sha256.hexdigest(), git.hexdigest()


def _compare(sent: Path, received: Path, pushed: Pushed) -> None:
    where = f"{pushed.repo_id} at {pushed.commit}, {sent.name}"
    if sent.suffix == ".safetensors":
        local, remote = open_safetensors(sent, where=sent.name), open_safetensors(received, where=where)
        names = set(local.keys())
        differing = names ^ set(remote.keys()) or {name for name in names if not _equal(local, remote, name)}
        if differing:
            raise LoraSuiteError(
                "tensors on the Hub differ from those pushed", where=where, got=", ".join(sorted(differing)[:3])
            )
    elif sent.read_bytes() != received.read_bytes():
        raise LoraSuiteError("the file on the Hub differs from the one pushed", where=where)


def _equal(local: Any, remote: Any, name: str) -> bool:
    one, other = local.get_tensor(name), remote.get_tensor(name)
    return one.dtype == other.dtype and torch.equal(one, other)


def _delete_empty_repo(api: HfApi, repo_id: str) -> None:
    """Delete a repository that was created for a push that failed, unless it has content."""
    try:
        state = read_state(api, repo_id)
        if state is not None and set(state.files) <= {".gitattributes"}:
            api.delete_repo(repo_id)
    except Exception as error:
        log.warning("the empty repository %s could not be deleted (%s)", repo_id, type(error).__name__)
