"""The section of a model card about a check of the adapter (`check_upgrade`)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..checking.page import CHECK_SCHEMA, DATA, weights_hash
from ..errors import LoraSuiteError
from ..io.json_file import read_json

log = logging.getLogger(__name__)


def read_check(folder: Path) -> dict[str, Any] | None:
    """Return the check beside an adapter; None without one, or with one of other weights or of another program."""
    if not (folder / DATA).is_file():
        return None
    try:
        values = read_json(folder / DATA, where=DATA, schema=CHECK_SCHEMA)
    except LoraSuiteError as error:
        log.warning("the card has no check: %s", error)
        return None
    if values["weights"] != weights_hash(folder):
        log.warning("the card has no check: %s is about other weights (run `check --old` again)", DATA)
        return None
    return values


def check_values(check: Mapping[str, Any] | None, code: Callable[[Any], str]) -> dict[str, Any]:
    """Return the values of the card's template.

    Args:
        check: From `read_check`.
        code: Formats untrusted text.
    """
    if check is None:
        return {"check": ""}
    rows = []
    for line in check["lines"]:
        measured = "; ".join(text for text in (line["measured"], line["reason"]) if text)
        rows.append((code(line["name"]), line["status"], code(measured), code(line["threshold"] or "-")))
    subject = f"against {code(check['old_adapter'])} on {code(check['old_base'])}"
    return {"check": "passed" if check["passed"] else "failed", "check_subject": subject, "check_rows": rows}
