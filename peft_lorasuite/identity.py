"""Which backbone a map was built for: shapes, tokenizer and a sample of the weights, not its name."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .backbone import Backbone
from .errors import LoraSuiteError
from .spec import Architecture
from .vocabulary import tokenizer_hash

SAMPLE_ROWS = 64
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


@dataclass(frozen=True)
class Identity:
    """What tells a backbone from others.

    Attributes:
        name: Folder or Hub id it was read from; informs only.
        revision: Commit on the Hub, or None; informs only.
        arch: Shape and layout.
        tokenizer: Hash of the vocabulary, or None where there is no tokenizer to read.
        embedding: Hash of a sample of the embedding, rounded to bfloat16, or None if it was not read.
        files: Weight file -> SHA-256, from the Hub's metadata; empty for folders.
        tokenizer_files: Hash of the tokenizer's files: where it agrees, the vocabulary need not be read.
    """

    name: str
    revision: str | None
    arch: Architecture
    tokenizer: str | None = None
    embedding: str | None = None
    files: dict[str, str] = field(default_factory=dict)
    tokenizer_files: str | None = None

    @property
    def key(self) -> str:
        """Short name of the backbone's content, for caches."""
        return hashlib.sha256(f"{self.arch.sizes()}{self.tokenizer}{self.embedding}".encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "name": public_name(self.name), "arch": self.arch.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Identity:
        """Rebuild from `to_dict`; a name that is a path is refused, for it may become an adapter's base."""
        built = cls(**{**values, "arch": Architecture.from_dict(values["arch"])})
        hashes = (built.tokenizer or "", built.embedding or "", built.tokenizer_files or "")
        texts = (built.name, built.revision or "", *hashes)
        if not all(isinstance(text, str) for text in (*texts, *built.files, *built.files.values())):
            raise LoraSuiteError("an identity holds what is no text", got=repr(built.name))
        if public_name(built.name) != built.name or "\\" in built.name:
            raise LoraSuiteError("a backbone's name is a path", got=repr(built.name), wanted="a Hub id or a plain name")
        return built


def identify(backbone: Backbone) -> Identity:
    """Read a backbone's identity; the weights themselves are read only as far as the sample goes."""
    return Identity(
        backbone.name,
        backbone.source.revision if backbone.source.folder is not None else backbone.source.commit,
        backbone.arch,
        tokenizer_hash(backbone.tokenizer),
        embedding_sample(backbone),
        backbone.source.hashes(),
        tokenizer_files(backbone),
    )


def public_name(name: str) -> str:
    """Last component of a path, or a Hub id as it is: maps and adapters carry no path of the machine."""
    is_id = name.count("/") <= 1 and not name.startswith((".", "~", "/"))
    return name if is_id else name.rstrip("/").rsplit("/", 1)[-1]


def embedding_sample(backbone: Backbone) -> str:
    """Hash some rows of the token embedding in bfloat16, the same for a float32, float16-safe or bfloat16 copy."""
    rows = torch.linspace(0, backbone.arch.vocabulary - 1, SAMPLE_ROWS).long().tolist()
    table = backbone.weights.rows(backbone.locate(f"{backbone.arch.embedding}.weight"), rows)
    return hashlib.sha256(table.to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()).hexdigest()


def tokenizer_files(backbone: Backbone) -> str | None:
    """Hash a tokenizer's files as they are: a hundredth of a second, where reading the vocabulary takes one or two.

    None for a model in memory, and where there is no tokenizer.json.
    """
    source = backbone.source
    if source.memory or not source.has(TOKENIZER_FILES[0]):
        return None
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        path = source.fetch(name) if source.has(name) else None
        digest.update(hashlib.sha256(path.read_bytes()).digest() if path else b"-")
    return digest.hexdigest()


def check_same(wanted: Identity, backbone: Backbone, role: str) -> None:
    """Refuse a backbone that is not the one a map was built for.

    On the Hub the repository's file hashes decide and no weight is fetched; otherwise the embedding's sample does.
    """
    faults = _differences(wanted.arch.sizes(), backbone.arch.sizes())
    files = backbone.source.hashes() if wanted.files else {}
    if not faults and files and files != wanted.files:
        faults = ["the weight files' hashes"]
    if not faults and not files and wanted.embedding and embedding_sample(backbone) != wanted.embedding:
        faults = ["the embedding's values"]
    if not faults and wanted.tokenizer and not _same_tokenizer(wanted, backbone):
        faults = ["the vocabulary"]
    if faults:
        raise LoraSuiteError(
            f"the upgrade map was built for another {role} backbone",
            where=repr(backbone),
            got=", ".join(faults) + " differ",
            wanted=wanted.name,
            do="build a map for this pair (peft-lorasuite map OLD NEW -o DIR)",
        )


def _same_tokenizer(wanted: Identity, backbone: Backbone) -> bool:
    """Compare the files, and where these differ or are not known, the vocabularies."""
    if wanted.tokenizer_files is not None and tokenizer_files(backbone) == wanted.tokenizer_files:
        return True
    return tokenizer_hash(backbone.tokenizer) == wanted.tokenizer


def _differences(wanted: dict[str, Any], got: dict[str, Any]) -> list[str]:
    return [f"{name} {got[name]} for {wanted[name]}" for name in wanted if wanted[name] != got[name]]
