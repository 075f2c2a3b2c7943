"""Results published in the LoRASuite paper, for comparison with measured ones.

``data/published.json`` has them with the number of the paper's table. The paper decodes with beam search of width 4 at
temperature 0.1 and this package decodes greedily: compare the order of methods, not tenths of a percent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from ..errors import LoraSuiteError, unknown_name_error


def published() -> dict[str, Any]:
    """Return the whole record: ``source``, ``note``, ``columns`` of each suite, ``tables`` with scores in percent."""
    return json.loads(resources.files("peft_lorasuite").joinpath("data/published.json").read_text(encoding="utf-8"))


def published_pairs() -> tuple[str, ...]:
    """Return the pairs of backbones in the paper, as "OLD -> NEW", in its order."""
    return tuple(dict.fromkeys(_pair(table) for table in published()["tables"]))


def published_rows(pair: str, suite: str, peft: str = "LoRA") -> Mapping[str, Mapping[str, float]]:
    """Return the paper's rows for a pair of backbones, as `tables.markdown_table` takes them.

    Args:
        pair: One of `published_pairs`; white space and case are ignored.
        suite: ``math`` or ``commonsense``.
        peft: ``LoRA``, or ``AdaLoRA`` and ``DoRA`` (math, MiniCPM only).

    Returns:
        Label ("MiniCPM-2B, LoRASuite w LFT (100)") -> column -> percent, in the paper's order.

    Raises:
        LoraSuiteError: If the paper has no such table.
    """
    record = published()
    tables = [table for table in record["tables"] if _normalize(_pair(table)) == _normalize(pair)]
    if not tables:
        raise unknown_name_error("published pair", pair, published_pairs())
    found = [table for table in tables if table["suite"] == suite and table["peft"].lower() == peft.lower()]
    if not found:
        available = ", ".join(f"{table['suite']} with {table['peft']}" for table in tables)
        raise LoraSuiteError("the paper has no such table", where=pair, got=f"{suite} with {peft}", wanted=available)
    columns = record["columns"][suite]
    return {
        f"{row['model']}, {row['adapter'] or 'no adapter'}": dict(zip(columns, row["scores"], strict=True))
        for row in found[0]["rows"]
    }


def _pair(table: Mapping[str, Any]) -> str:
    return f"{table['old']} -> {table['new']}"


def _normalize(text: str) -> str:
    return "".join(text.lower().split())
