"""The tokenizer in an adapter's folder: training tools save it there, with the tokens that they added."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ..io.source import Source
from ..models.tokenizer import open_tokenizer

log = logging.getLogger(__name__)

TOKENIZER = "tokenizer.json"
"""File of a fast tokenizer; without it, an adapter counts as having no tokenizer."""
OTHERS = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "vocab.json",
    "merges.txt", "tokenizer.model",
)  # fmt: skip
"""Further files that transformers reads if they are there."""


def fetch_tokenizer(source: Source) -> Path | None:
    """Download the tokenizer of an adapter's repository; return its folder, None if there is no tokenizer."""
    path = source.fetch(TOKENIZER)
    if path is not None and source.folder is None:
        for name in OTHERS:
            source.fetch(name)
    return None if path is None else path.parent


def read_tokenizer(source: Source) -> Any:
    """Return the tokenizer in an adapter's folder or repository; None if it has none.

    Raises:
        LoraSuiteError: If it cannot be loaded.
    """
    folder = fetch_tokenizer(source)
    return None if folder is None else load_tokenizer_folder(folder, source.name)


def load_tokenizer_folder(folder: Path, where: str) -> Any:
    """Return the tokenizer in a folder; None if it has none."""
    if not (folder / TOKENIZER).is_file():
        return None
    do = "fetch it again, or delete the tokenizer files if no tokens were added"
    return open_tokenizer(Source(str(folder), "adapter"), str(folder), where=where, do=do, local_files_only=True)


def added_tokens(tokenizer: Any, base: Any) -> dict[str, int]:
    """Return the tokens of a tokenizer that are not in its base, or have another id there, in the order of ids.

    None of them counts if most tokens of the base have other ids: the tokenizer is that of another backbone.
    """
    known, own = base.get_vocab(), tokenizer.get_vocab()
    same = sum(own.get(token) == number for token, number in known.items())
    if 2 * same < len(known):
        log.warning("the tokenizer in the adapter's folder is not that of its backbone, and is not used")
        return {}
    added = {token: number for token, number in own.items() if known.get(token) != number}
    return dict(sorted(added.items(), key=lambda item: item[1]))
