"""The repositories of the loopback Hub: blobs, atomic commits, refs, and what the Hub derives from a model card."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import yaml

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".npy", ".npz", ".onnx", ".h5", ".model", ".gz", ".zip", ".png")
LFS_SIZE = 10 * 1024 * 1024  # larger text goes to LFS as well
EPOCH = "2026-01-01T00:00:00.000Z"
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
REPO_NAME = re.compile(r"\w(?:[\w.-]{0,94}\w)?")


class HubError(Exception):
    """An answer that is an error, with the headers that tell the client which one."""

    def __init__(self, status: int, message: str, code: str | None = None, commit: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        named = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": commit}
        self.headers = {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True)
class Blob:
    """One stored file."""

    data: bytes
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        """What git itself holds of an LFS file."""
        spec = "https://git-lfs.github.com/spec/v1"
        return f"version {spec}\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()

    @cached_property
    def oid(self) -> str:
        """The git object id: of the pointer for an LFS file."""
        content = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    """An immutable state of a repository."""

    oid: str
    files: Mapping[str, Blob]
    title: str
    parent: str | None


@dataclass
class Repo:
    """A model repository. ``refs`` maps branches, tags and ``refs/pr/N`` to commit ids."""

    id: str
    private: bool = False
    gated: bool = False
    granted: set[str] = field(default_factory=set)  # users let in through the gate
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    tags: set[str] = field(default_factory=set)
    store: dict[str, bytes] = field(default_factory=dict)  # LFS objects by sha256, committed or only uploaded

    @property
    def namespace(self) -> str:
        return self.id.split("/")[0] if "/" in self.id else ""

    def at(self, revision: str) -> Commit:
        """The commit of a branch, tag, pull request, or (shortened) commit id; HubError 404 otherwise."""
        oid = self.refs.get(revision, revision)
        if oid in self.commits:
            return self.commits[oid]
        found = [c for c in self.commits if re.fullmatch(r"[0-9a-f]{7,40}", oid) and c.startswith(oid)]
        if len(found) != 1:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[found[0]]

    def commit(self, files: Mapping[str, Blob], title: str, ref: str, parent: str | None = None) -> Commit:
        """Record a whole new state and move one ref to it, which is the only visible step."""
        state = [self.id, parent, title, len(self.commits), sorted((path, blob.oid) for path, blob in files.items())]
        oid = hashlib.sha1(json.dumps(state).encode()).hexdigest()
        self.commits[oid] = Commit(oid, dict(files), title, parent)
        self.refs[ref] = oid
        return self.commits[oid]

    def history(self, revision: str) -> Iterable[Commit]:
        """Commits from this one back to the first."""
        oid: str | None = self.at(revision).oid
        while oid is not None:
            yield self.commits[oid]
            oid = self.commits[oid].parent


def is_lfs(path: str, sample: bytes, size: int) -> bool:
    """Whether the Hub keeps this file in LFS: by name, by size, or because it is not text."""
    return path.endswith(LFS_SUFFIXES) or size > LFS_SIZE or b"\0" in sample[:512]


def apply_commit(base: Commit, lines: bytes, store: Mapping[str, bytes]) -> tuple[dict[str, Blob], str]:
    """The files and the title that an ndjson commit asks for; HubError before anything has changed.

    ``store`` holds the uploaded LFS objects by sha256.
    """
    files, title = dict(base.files), ""
    for line in lines.splitlines():
        entry = json.loads(line)
        key, value = entry["key"], entry["value"]
        path = value.get("path", "")
        if key == "header":
            title = value["summary"]
            if value.get("parentCommit") not in (None, base.oid):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            continue
        if not path or path.startswith("/") or ".." in path.split("/"):
            raise HubError(400, f"Invalid path in repo: {path!r}")
        if key == "file":
            files[path] = Blob(base64.b64decode(value["content"]), lfs=False)
        elif key == "lfsFile":
            if value["oid"] not in store:
                raise HubError(400, f"LFS object {value['oid']} of {path} was not uploaded")
            files[path] = Blob(store[value["oid"]], lfs=True)
        elif key == "deletedFile" and path in files:
            del files[path]
        elif key == "deletedFolder" and any(name.startswith(path.rstrip("/") + "/") for name in files):
            files = {name: blob for name, blob in files.items() if not name.startswith(path.rstrip("/") + "/")}
        elif key in ("deletedFile", "deletedFolder"):
            raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
        else:
            raise HubError(400, f"Unknown commit operation {key!r}")
    return files, title


def front_matter(readme: str) -> dict[str, Any]:
    """The metadata of a model card, empty without any; HubError 400 when the Hub would refuse it."""
    match = re.match(r"---\s*\r?\n(.*?)\r?\n?---\s*(?:\r?\n|$)", readme, re.DOTALL)
    try:
        card = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError as error:
        raise HubError(400, f"Invalid YAML in README.md: {error}") from error
    if not isinstance(card or {}, dict):
        raise HubError(400, "The metadata of README.md must be a mapping")
    for base in as_list((card or {}).get("base_model")):
        if not re.fullmatch(r"(?:[\w.-]+/)?[\w.-]+", str(base)):
            raise HubError(400, f'"base_model" with value "{base}" is not valid. Use a model id')
    if any(not isinstance(m, dict) or "results" not in m for m in as_list((card or {}).get("model-index"))):
        raise HubError(400, '"model-index" entries need "name" and "results"')
    return card or {}


def as_list(value: Any) -> list[Any]:
    """A YAML field that holds one value, several or none."""
    return value if isinstance(value, list) else [] if value is None else [value]


def describe(repo: Repo, commit: Commit, *, blobs: bool) -> dict[str, Any]:
    """The model info that the Hub's API gives; sizes and hashes of the files only with ``blobs``."""
    card, adapter = _card(commit), _json(commit, "adapter_config.json")
    config = {k: v for k, v in _json(commit, "config.json").items() if k in ("architectures", "model_type")}
    if adapter:
        config["peft"] = {key: adapter.get(key) for key in ("base_model_name_or_path", "task_type")}
    relation = card.get("base_model_relation", "adapter" if adapter else "finetune")
    tags = [*as_list(card.get("library_name")), *as_list(card.get("tags"))]
    tags += ["safetensors"] if any(path.endswith(".safetensors") for path in commit.files) else []
    for base in as_list(card.get("base_model")):
        tags += [f"base_model:{base}", f"base_model:{relation}:{base}"]
    tags += [f"license:{name}" for name in as_list(card.get("license"))]
    return {
        "id": repo.id, "modelId": repo.id, "author": repo.namespace, "sha": commit.oid, "private": repo.private,
        "gated": "manual" if repo.gated else False, "disabled": False, "lastModified": EPOCH, "createdAt": EPOCH,
        "likes": 0, "downloads": 0, "tags": list(dict.fromkeys(tags)), "library_name": card.get("library_name"),
        "pipeline_tag": card.get("pipeline_tag"), "cardData": card, "config": config,
        "siblings": [_sibling(path, blob, blobs=blobs) for path, blob in sorted(commit.files.items())],
    }  # fmt: skip


def _card(commit: Commit) -> dict[str, Any]:
    """The card's metadata; a test may have planted a broken card, which the Hub shows as having none."""
    try:
        return front_matter(read_text(commit, "README.md"))
    except HubError:
        return {}


def _json(commit: Commit, path: str) -> dict[str, Any]:
    try:
        value = json.loads(read_text(commit, path) or "{}")
    except json.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}


def read_text(commit: Commit, path: str) -> str:
    """A text file of a commit, empty when it is not there."""
    blob = commit.files.get(path)
    return blob.data.decode(errors="replace") if blob else ""


def _sibling(path: str, blob: Blob, *, blobs: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {"rfilename": path}
    if blobs:
        entry |= {"size": len(blob.data), "blobId": blob.oid}
    if blobs and blob.lfs:
        entry["lfs"] = {"sha256": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
    return entry


def tree(commit: Commit, folder: str, *, recursive: bool) -> list[dict[str, Any]]:
    """The entries under a folder ("" for the root); HubError 404 when there is no such folder."""
    prefix = f"{folder.strip('/')}/" if folder else ""
    inside = [path for path in sorted(commit.files) if path.startswith(prefix)]
    if not inside and prefix:
        raise HubError(404, f"{folder} does not exist on the revision", "EntryNotFound", commit.oid)
    folders = {path[: i + 1] for path in inside for i, c in enumerate(path) if c == "/" and i >= len(prefix)}
    shown = [path for path in inside if recursive or "/" not in path[len(prefix) :]]
    top = [name for name in sorted(folders) if recursive or "/" not in name[len(prefix) : -1]]
    return [folder_entry(name[:-1]) for name in top] + [file_entry(path, commit.files[path]) for path in shown]


def folder_entry(path: str) -> dict[str, Any]:
    """A folder as tree and paths-info list it."""
    return {"type": "directory", "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0, "path": path}


def file_entry(path: str, blob: Blob) -> dict[str, Any]:
    """A file as tree and paths-info list it."""
    entry: dict[str, Any] = {"type": "file", "oid": blob.oid, "size": len(blob.data), "path": path}
    if blob.lfs:
        entry["lfs"] = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
    return entry
