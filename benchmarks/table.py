"""Make the table (Markdown) and the bar chart (PNG) of a gap benchmark from its rows.

    python benchmarks/table.py benchmarks/results/arc [--ceiling ROW]

Rows of further seeds stand in folders seed1, seed2 ... below (gap.py --seed 1 --out DIR/seed1); the table has means.
Gap recovered = (NLL base - NLL row) / (NLL base - NLL ceiling). The ceiling is full retraining on the new backbone
where that row is there, otherwise the old backbone with its adapter, and the table says which.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from common import paired, wilson

MEANS = (
    "nll", "accuracy", "exact", "seen_accuracy", "unseen_accuracy", "generated_accuracy", "generated_ended", "seconds"
)  # fmt: skip
JUDGED = {"right": "interval", "generated_right": "generated_interval"}
"""What is told item by item -> the interval of its mean."""
LEAST_GAIN = 0.1
"""Nats below which a retraining gains too little for the share to mean anything."""


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """Read the rows of a benchmark, each the mean over its seeds."""
    rows = {}
    for path in sorted(folder.glob("*.json")):
        files = [path, *sorted(folder.glob(f"seed*/{path.name}"))]
        rows[path.stem] = averaged([json.loads(file.read_text(encoding="utf-8")) for file in files])
    return rows


def averaged(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a row's mean over its seeds, with the ``spread`` of its likelihood; one run as it is."""
    if len(runs) == 1:
        return runs[0]
    means: dict[str, Any] = {name: statistics.mean(run[name] for run in runs) for name in MEANS if name in runs[0]}
    for name, interval in JUDGED.items():
        if name in runs[0]:
            right = [statistics.mean(map(int, item)) for item in zip(*(run[name] for run in runs), strict=True)]
            means |= {name: right, interval: wilson(sum(right), len(right))}
    return runs[0] | means | {"spread": f" ± {statistics.stdev(run['nll'] for run in runs):.3f} ({len(runs)})"}


def gap(row: dict[str, Any], base: dict[str, Any], ceiling: dict[str, Any]) -> float | None:
    """Share of the adapter's gain that a row recovers, None where the gain is too small."""
    gain = base["nll"] - ceiling["nll"]
    return (base["nll"] - row["nll"]) / gain if gain >= LEAST_GAIN else None


def table(rows: dict[str, dict[str, Any]], ceiling: str) -> str:
    """Return the table in Markdown, best row first."""
    base = rows["base"]
    lines = [
        "| row | NLL (± seeds) | gap recovered | accuracy (95 % interval) | against base, paired | exact | seconds |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in sorted(rows.items(), key=lambda pair: -pair[1]["nll"]):
        share = None if name in ("old", "old-adapted") else gap(row, base, rows[ceiling])
        low, high = row["interval"]
        mean, lower, upper = paired(row["right"], base["right"])
        lines.append(
            f"| {name} | {row['nll']:.3f}{row.get('spread', '')} | {'-' if share is None else f'{share:.0%}'} | "
            f"{row['accuracy']:.3f} ({low:.2f}-{high:.2f}) | {mean:+.3f} ({lower:+.3f} to {upper:+.3f}) | "
            f"{row['exact']:.2f} | {row['seconds']:.0f} |"
        )
    lines += [
        f"\n{name}: {row['seen_accuracy']:.3f} on what the prompts asked for, {row['unseen_accuracy']:.3f} on the rest."
        for name, row in rows.items()
        if "unseen_accuracy" in row
    ]
    lines += written(rows)
    return "\n".join([*lines, "", f"{base['items']} items. The gap is measured against the row {ceiling!r}."])


def written(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Return a table of the generated answers, where there are some: those right, and those that came to an end."""
    found = {name: row for name, row in rows.items() if "generated_right" in row}
    if "base" not in found:
        return []
    lines = [
        "",
        "| row | generated answers right (95 % interval) | against base, paired | ended |",
        "|---|---:|---:|---:|",
    ]
    for name, row in sorted(found.items(), key=lambda pair: pair[1]["generated_accuracy"]):
        low, high = row["generated_interval"]
        mean, lower, upper = paired(row["generated_right"], found["base"]["generated_right"])
        lines.append(
            f"| {name} | {row['generated_accuracy']:.2f} ({low:.2f}-{high:.2f}) of {len(row['generated_right'])} | "
            f"{mean:+.3f} ({lower:+.3f} to {upper:+.3f}) | {row['generated_ended']:.0%} |"
        )
    return lines


def chart(rows: dict[str, dict[str, Any]], ceiling: str, path: Path) -> None:
    """Draw the shares as bars."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shares = {name: gap(row, rows["base"], rows[ceiling]) for name, row in rows.items() if not name.startswith("old")}
    shown = sorted((share, name) for name, share in shares.items() if share is not None and name != "base")
    figure, axes = plt.subplots(figsize=(7, 0.32 * len(shown) + 1.2), layout="constrained")
    bars = axes.barh([name for _, name in shown], [100 * share for share, _ in shown], color="0.55", edgecolor="black")
    axes.bar_label(bars, fmt="%.0f %%", padding=3)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("gap recovered (% of the adapter's gain in NLL)")
    axes.margins(x=0.25, y=0.02)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Read the arguments, write table.md and gap.png beside the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ceiling", help="row that counts as 100 %%")
    args = parser.parse_args()
    rows = load(args.folder)
    ceiling = args.ceiling or next((name for name in ("full", "old-adapted") if name in rows), None)
    if ceiling is None or "base" not in rows:
        raise SystemExit("the rows 'base' and 'full' (or 'old-adapted') are needed: measure them with gap.py")
    text = table(rows, ceiling)
    (args.folder / "table.md").write_text(text + "\n", encoding="utf-8")
    chart(rows, ceiling, args.folder / "gap.png")
    print(text)


if __name__ == "__main__":
    main()
