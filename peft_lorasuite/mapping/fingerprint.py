"""Which backbone a map was built for: shapes, tokenizer and a sample of the weights, not its name."""

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
PLAIN = (torch.float32, torch.bfloat16, torch.float16)
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
        weights: Hash of a sample of every layer's projections, likewise; None in older maps, and for
            quantized weights, where it tells nothing.
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
        """Short name of the backbone's content; without a sample of the layers what it was before there was one."""
        text = f"{self.arch.sizes()}{self.tokenizer}{self.embedding}{self.weights or ''}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "name": public_name(self.name), "arch": self.arch.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Identity:
        """Rebuild from `to_dict`; a name that is a path is refused, for it may become an adapter's base."""
        built = cls(**{**values, "arch": Architecture.from_dict(values["arch"])})
        hashes = (built.tokenizer, built.embedding, built.tokenizer_files, built.weights)
        texts = (built.name, built.revision or "", *(text or "" for text in hashes))
        if not all(isinstance(text, str) for text in (*texts, *built.files, *built.files.values())):
            raise LoraSuiteError("an identity holds what is no text", got=repr(built.name))
        if public_name(built.name) != built.name or "\\" in built.name:
            raise LoraSuiteError("a backbone's name is a path", got=repr(built.name), wanted="a Hub id or a plain name")
        return built


def read_identity(backbone: Backbone) -> Identity:
    """Read a backbone's identity; the weights themselves are read only as far as the sample goes."""
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
    """Last component of a path, or a Hub id as it is: maps and adapters carry no path of the machine."""
    is_id = name.count("/") <= 1 and not name.startswith((".", "~", "/"))
    return name if is_id else name.rstrip("/").rsplit("/", 1)[-1]


def hash_embedding(backbone: Backbone) -> str:
    """Hash some rows of the token embedding in bfloat16, the same for a float32, float16-safe or bfloat16 copy."""
    rows = evenly_spaced(backbone.arch.vocabulary, SAMPLE_ROWS)
    table = backbone.weights.rows(backbone.locate(f"{backbone.arch.embedding}.weight"), rows)
    return hashlib.sha256(_bits(table)).hexdigest()


def hash_layers(backbone: Backbone) -> str | None:
    """Hash a few rows of every projection of every layer, likewise: fine-tunes of one base often share its embedding.

    None where a projection is not there as plain numbers (quantized, wrapped, or left on disk).
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
            if rows.dtype not in PLAIN or rows.is_meta or rows.shape[1:] != (width,):
                return None  # the shape too: packed bits may be stored as bfloat16
            digest.update(_bits(rows))
    return digest.hexdigest()


def _bits(rows: Tensor) -> bytes:
    return rows.to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()


def hash_tokenizer_files(backbone: Backbone) -> str | None:
    """Hash a tokenizer's files as they are: a hundredth of a second, where reading the vocabulary takes one or two.

    None for a model in memory, and where there is no tokenizer.json.
    """
    source = backbone.source
    if source.in_memory or not source.has(TOKENIZER_FILES[0]):
        return None
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        path = source.fetch(name) if source.has(name) else None
        digest.update(hashlib.sha256(_content(path)).digest() if path else b"-")
    return digest.hexdigest()


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise LoraSuiteError(
            f"the file cannot be read: {error.strerror}", where=path, do="check the rights to it"
        ) from error


def check_identity(wanted: Identity, backbone: Backbone, role: str) -> None:
    """Refuse a backbone that is not the one a map was built for."""
    faults = find_differences(wanted, backbone)
    if faults:
        raise LoraSuiteError(
            f"the upgrade map was built for another {role} backbone",
            where=repr(backbone),
            got=", ".join(faults) + " differ",
            wanted=wanted.name,
            do="build a map for this pair (peft-lorasuite map OLD NEW -o DIR)",
        )


def find_differences(wanted: Identity, backbone: Backbone) -> list[str]:
    """Name in what a backbone is not the one of an identity; empty where it is the same.

    On the Hub the repository's file hashes decide and no weight is fetched; otherwise samples of the weights do, as
    far as both sides have them.
    """
    faults = _differences(wanted.arch.sizes(), backbone.arch.sizes())
    files = backbone.source.hashes() if wanted.files else {}
    if not faults and files and files != wanted.files:
        faults = ["the weight files' hashes"]
    if not faults and not files and wanted.embedding and hash_embedding(backbone) != wanted.embedding:
        faults = ["the embedding's values"]
    if not faults and not files and wanted.weights and hash_layers(backbone) not in (None, wanted.weights):
        faults = ["the layers' values"]
    if not faults and wanted.tokenizer and not _same_tokenizer(wanted, backbone):
        faults = ["the vocabulary"]
    return faults


def _same_tokenizer(wanted: Identity, backbone: Backbone) -> bool:
    """Compare the files, and where these differ or are not known, the vocabularies."""
    if wanted.tokenizer_files is not None and hash_tokenizer_files(backbone) == wanted.tokenizer_files:
        return True
    return tokenizer_hash(backbone.tokenizer) == wanted.tokenizer


def _differences(wanted: dict[str, Any], got: dict[str, Any]) -> list[str]:
    return [f"{name} {got[name]} for {wanted[name]}" for name in wanted if wanted[name] != got[name]]
