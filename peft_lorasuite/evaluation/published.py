"""The LoRASuite paper's own numbers, to stand beside measured ones: published, not measured here.

They live in ``data/published.json`` with the table each was printed in. The paper measured with beam search of width
4 at temperature 0.1, this package decodes greedily: compare orders, not tenths.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from ..errors import LoraSuiteError, unknown


def published() -> dict[str, Any]:
    """The whole record: ``source``, ``note``, ``columns`` by suite, and ``tables`` of rows with scores in percent."""
    return json.loads(resources.files("peft_lorasuite").joinpath("data/published.json").read_text(encoding="utf-8"))


def published_pairs() -> tuple[str, ...]:
    """The pairs that have rows, as "OLD -> NEW", in the paper's order."""
    return tuple(dict.fromkeys(_pair(table) for table in published()["tables"]))


def published_rows(pair: str, suite: str, peft: str = "LoRA") -> Mapping[str, Mapping[str, float]]:
    """The paper's rows for an upgrade, for `tables.markdown_table`.

    Args:
        pair: One of `published_pairs`; white space and case do not count.
        suite: ``math`` or ``commonsense``.
        peft: ``LoRA``, or ``AdaLoRA`` and ``DoRA`` (math, MiniCPM only).

    Returns:
        Label ("MiniCPM-2B, LoRASuite w LFT (100)") to column to percent, in the paper's order.
    """
    record = published()
    tables = [table for table in record["tables"] if _plain(_pair(table)) == _plain(pair)]
    if not tables:
        raise unknown("published pair", pair, published_pairs())
    found = [table for table in tables if table["suite"] == suite and table["peft"].lower() == peft.lower()]
    if not found:
        have = ", ".join(f"{table['suite']} with {table['peft']}" for table in tables)
        raise LoraSuiteError("the paper has no such table", where=pair, got=f"{suite} with {peft}", wanted=have)
    columns = record["columns"][suite]
    return {
        f"{row['model']}, {row['adapter'] or 'no adapter'}": dict(zip(columns, row["scores"], strict=True))
        for row in found[0]["rows"]
    }


def _pair(table: Mapping[str, Any]) -> str:
    return f"{table['old']} -> {table['new']}"


def _plain(text: str) -> str:
    return "".join(text.lower().split())
