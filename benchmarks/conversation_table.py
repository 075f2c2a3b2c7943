"""The table of a benchmark of adapters trained on conversations, from the rows that conversation_pair.py writes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import paired, stage


def summarize(out: Path, rows: Sequence[str], seeds: Sequence[int], figures: dict[str, str]) -> str:
    """Return a Markdown table: means over the seeds, and shares of the gap to full retraining at its best rate.

    ``figures`` are the columns with means of a row's figures: heading -> name.
    """
    read = {row: [stage(out / f"seed-{seed}", row, dict) for seed in seeds] for row in rows}
    nll = {row: statistics.mean(one["nll"] for one in found) for row, found in read.items()}
    base, full = nll.get("new-base"), min((nll[row] for row in rows if row.startswith("full-")), default=None)
    figures = {**figures, "other text": "other_text"}
    heads = ["row", "NLL", "gap", "against the base", *figures, "seconds"]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    for row, found in read.items():
        new = base is not None and not row.startswith("old-")
        gap = f"{(base - nll[row]) / (base - full):.0%}" if new and full is not None else "-"
        against = against_base(found, read["new-base"]) if new else "-"
        means = [f"{statistics.mean(one.get(key, 0.0) for one in found):.3f}" for key in figures.values()]
        seconds = statistics.mean(one.get("upgrade_seconds", 0) for one in found)
        lines.append(f"| {' | '.join([row, f'{nll[row]:.3f}', gap, against, *means, f'{seconds:.0f}'])} |")
    return "\n".join(lines)


def against_base(found: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]]) -> str:
    """Return the paired difference of accuracies over all seeds, with its 95 % interval."""
    left, right = (map(int, "".join(one["right"] for one in side)) for side in (found, base))
    return "{:+.3f} ({:+.3f} to {:+.3f})".format(*paired(left, right))


def write_table(out: Path, text: str) -> None:
    """Write and print a table."""
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)
