"""The identity of a map's backbone: architecture, tokenizer and samples of the weights, not the name."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..arch.config_values import check_architecture, first_difference, read_config_values
from ..arch.spec import Architecture
from ..errors import LoraSuiteError, error_context
from ..models.backbone import Backbone
from ..text.vocabulary import tokenizer_hash
from .samples import EMPTY, hash_weights

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


@dataclass(frozen=True)
class Identity:
    """What distinguishes a backbone from others.

    Attributes:
        name: Folder or Hub id it was read from; not compared.
        revision: Commit on the Hub, or None; not compared.
        arch: Sizes and layout.
        tokenizer: Hash of the vocabulary.
        samples: Kind of tensors (see `samples.KINDS`) -> hash of a sample of their values.
        config: The values of the backbone's config that its converter reads, to check ``arch`` without the backbone.
        files: Weight file -> SHA-256, from the Hub's metadata; empty for folders.
        tokenizer_files: Hash of the tokenizer's files; where it agrees, the vocabulary need not be read.
    """

    name: str
    revision: str | None
    arch: Architecture
    tokenizer: str
    samples: dict[str, str]
    config: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    tokenizer_files: str | None = None

    @property
    def key(self) -> str:
        """Short hash of the backbone's content."""
        text = json.dumps([self.arch.to_dict(), self.tokenizer, self.samples], sort_keys=True)
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
    """Read a backbone's identity, and only the sampled values of its weights."""
    backbone.check_depth()
    return Identity(
        backbone.name,
        backbone.source.commit,
        backbone.arch,
        tokenizer_hash(backbone.tokenizer),
        {kind: text or EMPTY for kind, text in hash_weights(backbone).items()},
        read_config_values(backbone.config),
        backbone.source.hashes(),
        hash_tokenizer_files(backbone),
    )


def public_name(name: str) -> str:
    """Return a Hub id unchanged and the last component of a path, so that maps and adapters contain no local path."""
    is_id = name.count("/") <= 1 and not name.startswith((".", "~", "/"))
    return name if is_id else name.rstrip("/").rsplit("/", 1)[-1]


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


def check_identity(wanted: Identity, backbone: Backbone | None, role: str) -> None:
    """Check that a backbone is the one a map was built for.

    Args:
        wanted: The identity in the map.
        backbone: The backbone; None if it is not opened. Then its architecture must be the one that the registered
            converter gives for the config values in the map; weights and vocabulary cannot be checked.
        role: ``old`` or ``new``, for the message.

    Raises:
        LoraSuiteError: When it is another one.
    """
    if backbone is None:
        with error_context(f"{role} backbone of the upgrade map, {wanted.name}"):
            return check_architecture(wanted.arch, wanted.config)
    mismatch = find_mismatch(wanted, backbone)
    if mismatch is not None:
        got, expected = mismatch
        raise LoraSuiteError(
            f"the upgrade map was built for another {role} backbone", where=repr(backbone), got=got,
            wanted=f"{expected} in {wanted.name}" if expected else wanted.name,
            do="build a map for this pair (peft-lorasuite map OLD NEW -o DIR)",
        )  # fmt: skip
    return None


def find_mismatch(wanted: Identity, backbone: Backbone) -> tuple[str, str] | None:
    """Return the first difference of a backbone and an identity, as got and wanted; None where they agree.

    Compares the repository's file hashes where both are known, which downloads no weights, else samples of the weights.
    Weights of the backbone that cannot be read as plain numbers, such as quantized ones, are not compared.
    """
    if difference := first_difference(wanted.arch, backbone.arch):
        return f"{difference.name} {difference.got!r}", f"{difference.wanted!r}"
    files = backbone.source.hashes() if wanted.files else {}
    if files and files != wanted.files:
        return "the weight files' hashes differ", ""
    samples = {} if files else hash_weights(backbone)
    differing = [kind for kind, text in samples.items() if text not in (None, wanted.samples[kind])]
    if differing:
        return f"the values of the {differing[0]} differ", ""
    return None if _same_tokenizer(wanted, backbone) else ("the vocabulary differs", "")


def _same_tokenizer(wanted: Identity, backbone: Backbone) -> bool:
    """Compare the tokenizer files or, where these differ or are unknown, the vocabularies."""
    if wanted.tokenizer_files is not None and hash_tokenizer_files(backbone) == wanted.tokenizer_files:
        return True
    return tokenizer_hash(backbone.tokenizer) == wanted.tokenizer
