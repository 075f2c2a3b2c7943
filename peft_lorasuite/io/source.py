"""Where a backbone, adapter or map comes from: a folder, or a Hub repository at a pinned revision."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import LoraSuiteError
from .paths import exists, is_file, is_folder
from .retry import transport_error_type, with_retries

LARGE = 50 * 10**6
"""Bytes from which on a download is announced."""

REFUSALS: dict[object, tuple[str, str]] = {
    401: ("the Hub does not accept the token", "log in again (hf auth login), or pass another token"),
    403: ("the token has no right to do this", "use a token with write access to it"),
    429: ("the Hub asks for a pause", "try again later"),
}
"""HTTP status -> what it means, and what to do."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadOptions:
    """How files are fetched and models are loaded; the keywords of ``from_pretrained``, as one record.

    Attributes:
        token: Hub token; never shown.
        cache_dir: Hub cache to use instead of the default one.
        local_files_only: Use the cache alone.
        trust_remote_code: Whether transformers may run code of a repository.
        dtype: Of loaded models; ``"auto"`` lets the checkpoint and the device decide.
        device_map: As in ``AutoModelForCausalLM.from_pretrained``.
    """

    token: str | bool | None = None
    cache_dir: str | None = None
    local_files_only: bool = False
    trust_remote_code: bool = False
    dtype: Any = "auto"
    device_map: Any = None

    def hub_kwargs(self) -> dict[str, Any]:
        """Return the keywords of whatever only fetches files."""
        return {"token": self.token, "cache_dir": self.cache_dir, "local_files_only": self.local_files_only}

    def model_kwargs(self) -> dict[str, Any]:
        """Return the keywords of `Backbone.open`."""
        return asdict(self)


@dataclass(frozen=True)
class Source:
    """A named place of files.

    Attributes:
        name: Folder, or Hub id ``owner/name``.
        kind: ``"backbone"``, ``"adapter"`` or ``"upgrade map"``; used in messages.
        revision: Branch, tag or commit on the Hub.
        token: Hub token; never shown.
        cache_dir: Hub cache to use instead of the default one.
        local_files_only: Use the cache alone.
        in_memory: The weights are those of a loaded model, whatever the Hub holds under its name.
        hub_only: Treat the name as a Hub id even if a folder of that name exists: a name that a stranger's file gave.
    """

    name: str
    kind: str
    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | None = None
    local_files_only: bool = False
    hub_only: bool = False
    in_memory: bool = False

    def __repr__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"{self.kind} {self.name}{at}"

    @cached_property
    def folder(self) -> Path | None:
        """The local folder, or None for a Hub repository."""
        if not self.hub_only and is_folder(self.name):
            return Path(self.name).expanduser()
        local = Path(self.name).is_absolute() or self.name.startswith((".", "~"))
        if local or is_file(self.name) or self.name.count("/") > 1:
            wanted = "a Hub id (owner/name)" if self.hub_only else "an existing folder or a Hub id (owner/name)"
            raise LoraSuiteError(f"there is no such {self.kind}", where=self.name, wanted=wanted, do="check the name")
        return None

    @cached_property
    def commit(self) -> str | None:
        """Commit hash that the revision stands for, resolved once; None for a folder or a loaded model."""
        if self.in_memory or self.folder is not None:
            return None
        from huggingface_hub import HfApi

        with hub_errors(self):
            resolved = with_retries(
                lambda: HfApi(token=self.token).resolve_revision(
                    self.name, revision=self.revision, cache_dir=self.cache_dir, local_files_only=self.local_files_only
                )
            )
        return resolved.resolved

    @cached_property
    def listing(self) -> dict[str, tuple[int, str | None]]:
        """File -> (bytes, SHA-256 or None), as the Hub's metadata states them; empty for a folder or offline."""
        if self.in_memory or self.folder is not None or self._offline():
            return {}
        from huggingface_hub import HfApi

        with hub_errors(self):
            api = HfApi(token=self.token)
            info = with_retries(lambda: api.model_info(self.name, revision=self.commit, files_metadata=True))
        return {file.rfilename: (file.size or 0, file.lfs.sha256 if file.lfs else None) for file in info.siblings or []}

    def fetch(self, filename: str) -> Path | None:
        """Return the local path of a file, downloading it if need be; None where the place has no such file."""
        _check_file_name(filename, self)
        if self.folder is not None:
            path = self.folder / filename
            return path if is_file(path) else None
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

        with hub_errors(self):
            kept = try_to_load_from_cache(self.name, filename, cache_dir=self.cache_dir, revision=self.commit)
        if not isinstance(kept, str) and filename.endswith(".safetensors"):
            self.announce([filename])
        with hub_errors(self):
            try:
                path = with_retries(
                    lambda: hf_hub_download(
                        self.name,
                        filename,
                        revision=self.commit,
                        token=self.token,
                        cache_dir=self.cache_dir,
                        local_files_only=self.local_files_only,
                    )
                )
            except RemoteEntryNotFoundError:
                return None
            except LocalEntryNotFoundError:
                if not self._offline():
                    raise
                return None
        if not isinstance(kept, str):
            self._verify(Path(path), filename)
        return Path(path)

    def announce(self, filenames: list[str]) -> None:
        """Say what is about to be downloaded, and how much, before a large download."""
        size = sum(self.listing[name][0] for name in filenames if name in self.listing)
        if size >= LARGE:
            log.info("downloading %s of %r at %s: %.2f GB", ", ".join(filenames), self, self.commit, size / 1e9)

    def has(self, filename: str) -> bool:
        """Whether the place has a file; nothing is downloaded, and without a network the answer is no."""
        if self.folder is not None:
            return is_file(self.folder / filename)
        return filename in self.listing

    def _verify(self, path: Path, filename: str) -> None:
        """Compare a fresh download with its hash, which the cache has as the name of a large file: the client does not.

        A damaged file is removed, so that a new try fetches it again.
        """
        blob = path.resolve()
        if not re.fullmatch(r"[0-9a-f]{64}", blob.name):
            return
        found = hashlib.sha256()
        with blob.open("rb") as file:
            while piece := file.read(2**20):
                found.update(piece)
        if found.hexdigest() != blob.name:
            path.unlink(missing_ok=True)  # another process may have been faster
            blob.unlink(missing_ok=True)
            raise LoraSuiteError(
                f"the download of {filename} is damaged: its SHA-256 is another than the Hub's",
                where=repr(self),
                do="run it again to fetch it anew",
            )

    def require(self, filename: str, *, do: str | None = None) -> Path:
        """Return the local path of a file that must be there."""
        path = self.fetch(filename)
        if path is None:
            raise LoraSuiteError(f"the {self.kind} has no {filename}", where=self.name, do=do or "check the name")
        return path

    def read_json(self, filename: str, *, do: str | None = None) -> dict[str, Any]:
        """Read a JSON object that must be there."""
        return read_json(self.require(filename, do=do), where=f"{self.name}/{filename}")

    def full_name(self, filename: str) -> str:
        """Name a file of it, for messages."""
        return f"{self.name}/{filename}"

    def hashes(self) -> dict[str, str]:
        """SHA-256 of the weight files as the Hub's metadata states them; empty for a folder or without a network."""
        files = self.listing.items()
        return {name: sha256 for name, (_, sha256) in files if sha256 and name.endswith(".safetensors")}

    def _offline(self) -> bool:
        from huggingface_hub import constants

        return self.local_files_only or constants.HF_HUB_OFFLINE


def split_revision(text: str | Path) -> tuple[str, str | None]:
    """Split ``ID@REVISION``; a folder is a folder whatever its name, and so is what only a folder can be called."""
    text = str(text)
    if "@" not in text or text.startswith((".", "~", "/")) or exists(text):
        return text, None
    name, _, revision = text.partition("@")
    if not name or not revision:
        raise LoraSuiteError("the revision or the name is missing", where=text, wanted="ID@REVISION")
    if is_folder(name):
        raise LoraSuiteError("a folder has no revisions", where=text, got=revision, do="leave it out")
    return name, revision


def read_json(path: Path, *, where: str) -> dict[str, Any]:
    """Read a JSON object from a file; anything else is an error that names the place."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise LoraSuiteError(f"the file cannot be read as JSON: {error}", where=where, do="fetch it again") from error
    if not isinstance(values, dict):
        raise LoraSuiteError("the file holds no JSON object", where=where, got=type(values).__name__)
    return values


def _check_file_name(filename: str, source: Source) -> None:
    path = Path(filename)
    if path.is_absolute() or ".." in path.parts or "\\" in filename:
        raise LoraSuiteError("a file name points outside its place", where=source.name, got=repr(filename))


@contextmanager
def hub_errors(source: Source) -> Iterator[None]:
    """Turn what can go wrong on the Hub into one clear sentence, without the token or the request.

    The client's own errors are not chained: their texts hold signed addresses.
    """
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise _hub_error(
            source,
            "access to it is gated",
            f"accept its license at https://huggingface.co/{source.name} and log in (hf auth login)",
        ) from None
    except errors.RevisionNotFoundError:
        raise _hub_error(source, f"the Hub has no revision {source.revision!r} of it", "check the revision") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise _hub_error(
            source,
            "neither a folder nor a repository on the Hub",
            "check the name; if it is private, log in (hf auth login)",
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.RevisionResolutionError):
        raise _hub_error(
            source,
            f"it is {'' if source.hub_only else 'no folder, '}not in the local cache, and the Hub cannot be asked",
            "check the network, or drop the offline setting",
        ) from None
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "no answer")
        what, do = REFUSALS.get(status, ("the Hub refused", "check your token and rights, or try again later"))
        raise _hub_error(source, f"{what} (HTTP {status})", do) from None
    except (transport_error_type(), OSError) as error:
        raise _hub_error(
            source, f"the transfer failed ({type(error).__name__})", "check network and disk space; a new try resumes"
        ) from None


def _hub_error(source: Source, what: str, do: str) -> LoraSuiteError:
    return LoraSuiteError(what, where=repr(source), do=do)
