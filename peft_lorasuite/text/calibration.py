"""Calibration text from the built-in paragraphs, a file, strings or a dataset."""

from __future__ import annotations

import textwrap
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..errors import LoraSuiteError
from ..io.paths import is_file

MAX_CHARACTERS = 1500
"""Longer calibration texts are split."""


def built_in_text() -> list[str]:
    """Return the paragraphs of the calibration text that the package contains, in English."""
    return paragraphs(files("peft_lorasuite").joinpath("data/calibration.txt").read_text(encoding="utf-8"))


def paragraphs(text: str) -> list[str]:
    """Split a text at blank lines."""
    return [piece.strip() for piece in text.split("\n\n") if piece.strip()]


def calibration_texts(source: Any = None) -> list[str]:
    """Return calibration texts, each of at most `MAX_CHARACTERS` characters.

    Args:
        source: None for the built-in text, the path of a text file (paragraphs separated by blank lines), a list of
            strings, or a `datasets.Dataset` (its ``text`` column, else its first column of strings).

    Raises:
        LoraSuiteError: If the file cannot be read, the dataset has no column of strings, or the text is empty.
    """
    if source is None:
        return built_in_text()
    if isinstance(source, (str, Path)):
        path = Path(source)
        if not is_file(path):
            raise LoraSuiteError("file not found", where=path, do="pass a text file for the calibration")
        try:
            texts = paragraphs(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise LoraSuiteError(f"the file cannot be read: {error}", where=path, wanted="text in UTF-8") from error
    elif hasattr(source, "column_names"):
        columns = source.column_names
        column = (
            "text" if "text" in columns else next((name for name in columns if isinstance(source[0][name], str)), None)
        )
        if column is None:
            raise LoraSuiteError("the dataset has no column of strings", got=columns, wanted="a 'text' column")
        texts = [text for text in source[column] if text.strip()]
    else:
        texts = [str(text) for text in source if str(text).strip()]
    if not texts:
        raise LoraSuiteError("the calibration text is empty", where=source if isinstance(source, str) else None)
    return [piece for text in texts for piece in _split(text)]


def _split(text: str) -> list[str]:
    """Split a long text at spaces; `encode_text` truncates pieces that are still longer than the context."""
    if len(text) <= MAX_CHARACTERS:
        return [text]
    return textwrap.wrap(text, MAX_CHARACTERS, replace_whitespace=False, drop_whitespace=True)
