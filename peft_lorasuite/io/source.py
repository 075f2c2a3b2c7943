"""Sources of backbones, adapters and upgrade maps: a local folder, or a Hub repository at a fixed commit."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..compat import missing_file_error, resolve_commit, transport_error_type, unreachable_errors
from ..errors import CONTROL, LoraSuiteError
from .file_kinds import SCHEMAS
from .json_file import read_json
from .paths import exists, is_file, is_folder
from .retry import with_retries
from .schema import Kind

LARGE_DOWNLOAD = 50 * 10**6
"""Downloads of at least this many bytes are announced."""
HTTP_ERRORS: dict[object, tuple[str, str]] = {
    401: ("the Hub does not accept the token", "log in again (hf auth login), or pass another token"),
    403: ("the token has no permission for this", "use a token with write access to it"),
    429: ("the Hub's rate limit is reached", "try again later"),
}
"""HTTP status code -> what is wrong, and what to do."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadOptions:
    """How files are downloaded and models are loaded: the keyword arguments of ``from_pretrained`` in one record.

    Attributes:
        token: Hub token; never printed.
        cache_dir: Hub cache to use instead of the default one.
        local_files_only: Whether to use only files that are in the cache.
        trust_remote_code: Whether transformers may run code from a repository.
        dtype: Dtype of loaded models; ``"auto"`` chooses it by the checkpoint and the device.
        device_map: As in ``AutoModelForCausalLM.from_pretrained``.
    """

    token: str | bool | None = None
    cache_dir: str | None = None
    local_files_only: bool = False
    trust_remote_code: bool = False
    dtype: Any = "auto"
    device_map: Any = None

    def hub_kwargs(self) -> dict[str, Any]:
        """Return the keyword arguments of functions that only download files."""
        return {"token": self.token, "cache_dir": self.cache_dir, "local_files_only": self.local_files_only}

    def model_kwargs(self) -> dict[str, Any]:
        """Return the keyword arguments of `Backbone.open`."""
        return asdict(self)


DEFAULTS = LoadOptions()


@dataclass(frozen=True)
class Source:
    """The files of a backbone, adapter or upgrade map.

    Attributes:
        name: Folder, or Hub id ``owner/name``.
        kind: ``"backbone"``, ``"adapter"`` or ``"upgrade map"``; used in messages.
        revision: Branch, tag or commit on the Hub.
        token: Hub token; never printed.
        cache_dir: Hub cache to use instead of the default one.
        local_files_only: Whether to use only files that are in the cache.
        hub_only: Whether to read the name as a Hub id even if a folder of that name exists; set for names that come
            from untrusted files.
        in_memory: Whether the weights are those of a loaded model, whatever the Hub has under its name.
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
            raise LoraSuiteError(f"{self.kind} not found", where=self.name, wanted=wanted, do="check the name")
        return None

    @property
    def location(self) -> str:
        """The folder or Hub id, as the loaders of transformers take it."""
        return str(self.folder or self.name)

    @cached_property
    def commit(self) -> str | None:
        """Commit hash of the revision, resolved once; None for a folder or a loaded model."""
        if self.in_memory or self.folder is not None:
            return None
        from huggingface_hub import HfApi

        with hub_errors(self):
            api = HfApi(token=self.token)
            return with_retries(
                lambda: resolve_commit(api, self.name, self.revision, self.cache_dir, self.local_files_only)
            )

    @cached_property
    def listing(self) -> dict[str, tuple[int, str | None]]:
        """File name -> (bytes, SHA-256 or None) by the Hub's metadata; empty for a folder or offline."""
        if self.in_memory or self.folder is not None or self._offline():
            return {}
        from huggingface_hub import HfApi

        with hub_errors(self):
            api = HfApi(token=self.token)
            info = with_retries(lambda: api.model_info(self.name, revision=self.commit, files_metadata=True))
        return {file.rfilename: (file.size or 0, file.lfs.sha256 if file.lfs else None) for file in info.siblings or []}

    def fetch(self, filename: str) -> Path | None:
        """Return the local path of a file, downloaded if necessary; None if the source does not have it."""
        _check_file_name(filename, self)
        if self.folder is not None:
            path = self.folder / filename
            return path if is_file(path) else None
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import LocalEntryNotFoundError

        with hub_errors(self):
            cached = try_to_load_from_cache(self.name, filename, cache_dir=self.cache_dir, revision=self.commit)
        if not isinstance(cached, str) and filename.endswith(".safetensors"):
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
            except LocalEntryNotFoundError:
                if not self._offline():
                    raise
                return None
            except missing_file_error():
                return None
        if not isinstance(cached, str):
            self._verify(Path(path), filename)
        return Path(path)

    def announce(self, filenames: list[str]) -> None:
        """Log the names and the size of files before a large download."""
        size = sum(self.listing[name][0] for name in filenames if name in self.listing)
        if size >= LARGE_DOWNLOAD:
            log.info("downloading %s of %r at %s: %.2f GB", ", ".join(filenames), self, self.commit, size / 1e9)

    def has(self, filename: str) -> bool:
        """Whether the source has a file; downloads nothing, and returns False for a repository when offline."""
        if self.folder is not None:
            return is_file(self.folder / filename)
        return filename in self.listing

    def _verify(self, path: Path, filename: str) -> None:
        """Verify the SHA-256 of a downloaded file, which huggingface_hub does not do.

        The cache stores a large file under its hash. A damaged file is deleted, so that it is downloaded again.
        """
        blob = path.resolve()
        if not re.fullmatch(r"[0-9a-f]{64}", blob.name):
            return
        digest = hashlib.sha256()
        with blob.open("rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
        if digest.hexdigest() != blob.name:
            path.unlink(missing_ok=True)  # another process may have deleted it already
            blob.unlink(missing_ok=True)
            raise LoraSuiteError(
                f"the download of {filename} is damaged: its SHA-256 differs from the Hub's",
                where=repr(self),
                do="run it again to repeat the download",
            )

    def require(self, filename: str, *, do: str | None = None) -> Path:
        """Return the local path of a file as `fetch` does; raise `LoraSuiteError` if the source does not have it."""
        path = self.fetch(filename)
        if path is None:
            raise LoraSuiteError(f"the {self.kind} has no {filename}", where=self.name, do=do or "check the name")
        return path

    def read_json(self, filename: str, *, do: str | None = None, schema: Kind | None = None) -> dict[str, Any]:
        """Read a JSON object as the function `read_json` does; raise `LoraSuiteError` if there is no such file."""
        schema = schema or SCHEMAS.get(filename)
        return read_json(self.require(filename, do=do), where=f"{self.name}/{filename}", schema=schema)

    def full_name(self, filename: str) -> str:
        """Return the name of a file together with its source, for messages."""
        return f"{self.name}/{filename}"

    def hashes(self) -> dict[str, str]:
        """Return the SHA-256 of the weight files by the Hub's metadata; empty for a folder or offline."""
        files = self.listing.items()
        return {name: sha256 for name, (_, sha256) in files if sha256 and name.endswith(".safetensors")}

    def _offline(self) -> bool:
        from huggingface_hub import constants

        return self.local_files_only or constants.HF_HUB_OFFLINE


def split_revision(text: str | Path) -> tuple[str, str | None]:
    """Split ``ID@REVISION`` into id and revision; the revision is None for an existing path and a path by its form."""
    text = str(text)
    if "@" not in text or text.startswith((".", "~", "/")) or exists(text):
        return text, None
    name, _, revision = text.partition("@")
    if not name or not revision:
        raise LoraSuiteError("the id or the revision is missing", where=text, wanted="ID@REVISION")
    if is_folder(name):
        raise LoraSuiteError("a folder has no revisions", where=text, got=revision, do="leave the revision out")
    return name, revision


def _check_file_name(filename: str, source: Source) -> None:
    path = Path(filename)
    if path.is_absolute() or ".." in path.parts or "\\" in filename:
        raise LoraSuiteError("a file name points outside its folder", where=source.name, got=repr(filename))
    if CONTROL.search(filename):
        raise LoraSuiteError("a file name has control characters", where=source.name, got=repr(filename))


@contextmanager
def hub_errors(source: Source) -> Iterator[None]:
    """Turn errors of huggingface_hub into `LoraSuiteError`, without the token or the request.

    The original errors are not chained, because their messages contain signed URLs.
    """
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise _hub_error(
            source,
            "the repository is gated",
            f"accept its license at https://huggingface.co/{source.name} and log in (hf auth login)",
        ) from None
    except errors.RevisionNotFoundError:
        raise _hub_error(source, f"the repository has no revision {source.revision!r}", "check the revision") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise _hub_error(
            source,
            "not found, neither as a folder nor as a repository on the Hub",
            "check the name; if the repository is private, log in (hf auth login)",
        ) from None
    except unreachable_errors():
        raise _hub_error(
            source,
            f"not found {'' if source.hub_only else 'as a folder or '}in the local cache, and the Hub is not reachable",
            "check the network connection, or turn offline mode off",
        ) from None
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "no answer")
        default = "the Hub refused the request", "check your token and its permissions, or try again later"
        what, do = HTTP_ERRORS.get(status, default)
        raise _hub_error(source, f"{what} (HTTP {status})", do) from None
    except (transport_error_type(), OSError) as error:
        raise _hub_error(
            source,
            f"the transfer failed ({type(error).__name__})",
            "check the network and the disk space, and run it again to resume",
        ) from None


def _hub_error(source: Source, what: str, do: str) -> LoraSuiteError:
    return LoraSuiteError(what, where=repr(source), do=do)
