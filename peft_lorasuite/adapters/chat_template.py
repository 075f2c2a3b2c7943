"""The chat template of the tokenizer that trainers save beside an adapter."""

from __future__ import annotations

import json
from typing import Any

from ..errors import LoraSuiteError
from ..io.source import Source

TEMPLATE, CONFIG = "chat_template.jinja", "tokenizer_config.json"


def read_chat_template(source: Source) -> str | None:
    """Return the chat template beside an adapter; None if there is none, or several with names.

    Raises:
        LoraSuiteError: If a file cannot be read.
    """
    path = source.fetch(TEMPLATE)
    if path is not None:
        return _read(path)
    path = source.fetch(CONFIG)
    if path is None:
        return None
    try:
        values: Any = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise LoraSuiteError(f"the file is not JSON ({error})", where=path, do="fetch it again") from error
    template = values.get("chat_template") if isinstance(values, dict) else None
    if isinstance(template, list):  # named templates
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _read(path: Any) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise LoraSuiteError(f"the file cannot be read: {error}", where=path, do="fetch it again") from error
