"""Values of records as JSON has them, whatever library read them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..errors import LoraSuiteError


def plain(value: Any) -> Any:
    """Return a value of dicts with names, lists and scalars: pandas has arrays, and NaN where a value is missing."""
    if hasattr(value, "tolist") and not isinstance(value, type):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    missing = (isinstance(value, float) and value != value) or type(value).__name__ == "NAType"  # of pandas
    return None if missing else value


def as_record(record: Any) -> Any:
    """Return an object of plain values, without missing ones; what is none, or is nested too deeply, as it is."""
    if not isinstance(record, Mapping):
        return record
    try:
        return {name: one for name, one in plain(record).items() if one is not None}
    except RecursionError:
        return record


def without_nulls(value: Any) -> Any:
    """Return a nested value without the keys that are None: Arrow gives every object the keys of all others."""
    if isinstance(value, Mapping):
        return {name: without_nulls(one) for name, one in value.items() if one is not None}
    return [without_nulls(one) for one in value] if isinstance(value, (list, tuple)) else value


def parse_json(text: str, where: str) -> Any:
    """Parse JSON that a record has as text: CSV has no nested values."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LoraSuiteError(f"the text is not JSON ({error})", where=where, got=repr(text[:60])) from error


def json_or_none(text: Any) -> Any:
    """Return the list or object that a text holds as JSON, None if it holds none."""
    if not isinstance(text, str) or text.lstrip()[:1] not in ("[", "{"):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def describe(value: Any) -> str:
    """Return what an error says of a value of the wrong type."""
    return "an empty list" if isinstance(value, (list, tuple)) and not value else type(value).__name__
