"""Reading of JSON files, which are checked before anything else sees their values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import LoraSuiteError
from .file_kinds import SCHEMAS
from .schema import ANY, Kind, check

MAX_JSON = 10**8
"""Bytes of a JSON file; the largest known, a tokenizer, has a third of it."""


def read_json(path: Path, *, where: str, schema: Kind | None = None) -> dict[str, Any]:
    """Read a JSON object from a file and check it.

    Args:
        path: The file.
        where: Its name for error messages.
        schema: Its schema; by default, that of its file name, if it has one.

    Raises:
        LoraSuiteError: For a file that is too large, nested too deeply, or does not fit the schema.
    """
    try:
        if path.stat().st_size > MAX_JSON:
            raise ValueError(f"it has over {MAX_JSON // 10**6} MB")
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise LoraSuiteError(f"the file cannot be read as JSON: {error}", where=where, do="fetch it again") from error
    if not isinstance(values, dict):
        raise LoraSuiteError("the file must contain a JSON object", where=where, got=type(values).__name__)
    check(values, schema or SCHEMAS.get(path.name) or ANY, where=where)
    return values
