"""The identity of the backbone a map was built for: shapes, tokenizer and a sample of the weights, not the name."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..arch.spec import Architecture
from ..errors import LoraSuiteError
from ..io.checkpoint import evenly_spaced
from ..models.backbone import Backbone
from ..text.vocabulary import tokenizer_hash

SAMPLE_ROWS, LAYER_ROWS = 64, 4
"""Rows sampled of the embedding, and of every projection."""
PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


@dataclass(frozen=True)
class Identity:
    """What distinguishes a backbone from others.

    Attributes:
        name: Folder or Hub id it was read from; not compared.
        revision: Commit on the Hub, or None; not compared.
        arch: Shape and layout.
        tokenizer: Hash of the vocabulary, or None where there is no tokenizer to read.
        embedding: Hash of a sample of the embedding, rounded to bfloat16, or None if it was not read.
        files: Weight file -> SHA-256, from the Hub's metadata; empty for folders.
        tokenizer_files: Hash of the tokenizer's files; where it agrees, the vocabulary need not be read.
        weights: Hash of a sample of every layer's projections, rounded to bfloat16; None in older maps and for
            quantized weights.
    """

    name: str
    revision: str | None
    arch: Architecture
    tokenizer: str | None = None
    embedding: str | None = None
    files: dict[str, str] = field(default_factory=dict)
    tokenizer_files: str | None = None
    weights: str | None = None

    @property
    def key(self) -> str:
        """Short hash of the backbone's content, the same as in older maps where ``weights`` is None."""
        text = f"{self.arch.sizes()}{self.tokenizer}{self.embedding}{self.weights or ''}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "name": public_name(self.name), "arch": self.arch.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Identity:
        """Rebuild an identity from `to_dict`.

        Raises:
            LoraSuiteError: For inconsistent sizes, and for a name that is a path: it may become a base model.
        """
        built = cls(**{**values, "arch": Architecture.from_dict(values["arch"])})
        if public_name(built.name) != built.name or "\\" in built.name:
            raise LoraSuiteError(
                "the name of a backbone must not be a path", got=repr(built.name), wanted="a Hub id or a plain name"
            )
        return built


def read_identity(backbone: Backbone) -> Identity:
    """Read a backbone's identity, and only the sampled rows of its weights."""
    backbone.check_depth()
    return Identity(
        backbone.name,
        backbone.source.commit,
        backbone.arch,
        tokenizer_hash(backbone.tokenizer),
        hash_embedding(backbone),
        backbone.source.hashes(),
        hash_tokenizer_files(backbone),
        hash_layers(backbone),
    )


def public_name(name: str) -> str:
    """Return a Hub id unchanged and the last component of a path, so that maps and adapters contain no local path."""
    is_id = name.count("/") <= 1 and not name.startswith((".", "~", "/"))
    return name if is_id else name.rstrip("/").rsplit("/", 1)[-1]


def hash_embedding(backbone: Backbone) -> str:
    """Hash some rows of the token embedding in bfloat16, the same for copies in other floating point dtypes."""
    rows = evenly_spaced(backbone.arch.vocabulary, SAMPLE_ROWS)
    table = backbone.weights.rows(backbone.locate(f"{backbone.arch.embedding}.weight"), rows)
    return hashlib.sha256(_bits(table)).hexdigest()


def hash_layers(backbone: Backbone) -> str | None:
    """Hash a few rows of every projection in bfloat16: fine-tuned models often share the embedding of their base.

    Returns:
        The hash, or None where a projection cannot be read as plain numbers (quantized, wrapped, or left on disk).
    """
    digest = hashlib.sha256()
    for layer in range(backbone.arch.layers):
        for site in backbone.arch.sites:
            try:
                name = backbone.locate(f"{backbone.arch.layer_path}.{layer}.{site.path}.weight")
            except LoraSuiteError:
                return None
            rows = backbone.weights.sample_rows(name, LAYER_ROWS)
            shapes = [backbone.arch.shape(part) for part in site.parts]
            width = sum(out for out, _ in shapes) if site.conv1d else shapes[0][1]
            if rows.dtype not in PLAIN_DTYPES or rows.is_meta or rows.shape[1:] != (width,):
                return None  # the shape as well: packed quantized weights may be stored as bfloat16
            digest.update(_bits(rows))
    return digest.hexdigest()


def _bits(rows: Tensor) -> bytes:
    return rows.to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()


def hash_tokenizer_files(backbone: Backbone) -> str | None:
    """Hash the files of a tokenizer, which takes 0.01 s; reading the vocabulary takes one or two.

    Returns:
        The hash, or None for a model in memory and where there is no tokenizer.json.
    """
    source = backbone.source
    if source.in_memory or not source.has(TOKENIZER_FILES[0]):
        return None
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        path = source.fetch(name) if source.has(name) else None
        digest.update(hashlib.sha256(_read_bytes(path)).digest() if path else b"-")
    return digest.hexdigest()


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise LoraSuiteError(
            f"the file cannot be read: {error.strerror}", where=path, do="check its permissions"
        ) from error


def check_identity(wanted: Identity, backbone: Backbone, role: str) -> None:
    """Check that a backbone is the one a map was built for.

    Args:
        wanted: The identity in the map.
        backbone: The backbone.
        role: ``old`` or ``new``, for the message.

    Raises:
        LoraSuiteError: When it is another one.
    """
    differences = find_differences(wanted, backbone)
    if differences:
        raise LoraSuiteError(
            f"the upgrade map was built for another {role} backbone",
            where=repr(backbone),
            got=", ".join(differences) + " differ",
            wanted=wanted.name,
            do="build a map for this pair (peft-lorasuite map OLD NEW -o DIR)",
        )


def find_differences(wanted: Identity, backbone: Backbone) -> list[str]:
    """Name what differs between a backbone and an identity; empty where they agree.

    Compares the repository's file hashes where both are known, which downloads no weights, else samples of the weights.
    """
    differences = _size_differences(wanted.arch.sizes(), backbone.arch.sizes())
    files = backbone.source.hashes() if wanted.files else {}
    if not differences and files and files != wanted.files:
        differences = ["the weight files' hashes"]
    if not differences and not files and wanted.embedding and hash_embedding(backbone) != wanted.embedding:
        differences = ["the embedding's values"]
    if not differences and not files and wanted.weights and hash_layers(backbone) not in (None, wanted.weights):
        differences = ["the layers' values"]
    if not differences and wanted.tokenizer and not _same_tokenizer(wanted, backbone):
        differences = ["the vocabulary"]
    return differences


def _same_tokenizer(wanted: Identity, backbone: Backbone) -> bool:
    """Compare the tokenizer files or, where these differ or are unknown, the vocabularies."""
    if wanted.tokenizer_files is not None and hash_tokenizer_files(backbone) == wanted.tokenizer_files:
        return True
    return tokenizer_hash(backbone.tokenizer) == wanted.tokenizer


def _size_differences(wanted: dict[str, Any], got: dict[str, Any]) -> list[str]:
    return [f"{name} {got[name]} for {wanted[name]}" for name in wanted if wanted[name] != got[name]]
