"""The Hub client: differences between versions of huggingface_hub."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from .versions import has

log = logging.getLogger(__name__)


def transport_error_type() -> type[BaseException]:
    """Return the base exception of the HTTP library of huggingface_hub: requests, httpx (1.0), later httpx2."""
    from huggingface_hub.errors import HfHubHTTPError

    names = ("HTTPError",) if has("huggingface-hub", "1.0") else ("RequestException",)
    return next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ in names)


def missing_file_error() -> type[BaseException]:
    """Return the exception for a file that a repository does not have; the local cache has another (Hub 1.0)."""
    from huggingface_hub import errors

    return errors.RemoteEntryNotFoundError if has("huggingface-hub", "1.0") else errors.EntryNotFoundError


def unreachable_errors() -> tuple[type[BaseException], ...]:
    """Return the exceptions for a Hub that cannot be reached where the cache has no answer either (Hub 1.28)."""
    from huggingface_hub import errors

    known = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)
    return (*known, errors.RevisionResolutionError) if has("huggingface-hub", "1.28") else known


def resolve_commit(api: Any, name: str, revision: str | None, cache_dir: str | None, local_files_only: bool) -> str:
    """Return the commit of a revision, from the local cache if the Hub cannot be reached (Hub 1.28).

    Raises:
        One of `unreachable_errors`: If the Hub cannot be reached and the cache does not know the revision.
        HfHubHTTPError: If the Hub refuses the request.
    """
    if has("huggingface-hub", "1.28"):
        return api.resolve_revision(
            name, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only
        ).resolved
    if re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        return str(revision)
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(cache_dir or constants.HF_HUB_CACHE).expanduser() / repo_folder_name(repo_id=name, repo_type="model")
    reference = folder / "refs" / (revision or constants.DEFAULT_REVISION)
    error = None
    if not local_files_only:
        commit, error = _ask_for_commit(api, name, revision)
        if commit:
            _keep_reference(reference, commit)
            return commit
    if reference.is_file():
        return reference.read_text(encoding="utf-8").strip()
    from huggingface_hub.errors import LocalEntryNotFoundError

    raise LocalEntryNotFoundError(f"the cache has no revision {revision!r} of {name}") from error


def _ask_for_commit(api: Any, name: str, revision: str | None) -> tuple[str | None, BaseException | None]:
    """Return the commit by the Hub, or the error if the Hub cannot be reached."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return api.model_info(name, revision=revision).sha, None
    except (transport_error_type(), OfflineModeIsEnabled) as error:
        if isinstance(error, HfHubHTTPError) and getattr(error.response, "status_code", 500) < 500:
            raise
        return None, error


def _keep_reference(reference: Path, commit: str) -> None:
    """Write a revision's commit into the Hub cache, as a download of the revision would; a full disk is no error."""
    try:
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(commit, encoding="utf-8")
    except OSError as error:
        log.warning("the Hub cache cannot be written: %s", error)
