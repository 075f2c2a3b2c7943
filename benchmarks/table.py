"""Make the table (Markdown) and the bar chart (PNG) of a gap benchmark from its rows.

    python benchmarks/table.py benchmarks/results/arc [--ceiling ROW]

Rows of further seeds stand in folders seed1, seed2 ... below (gap.py --seed 1 --out DIR/seed1); the table has means.
Rows of an earlier state of the code stand in a folder "earlier"; they have a table of their own and are not drawn.
Gap recovered = (NLL base - NLL row) / (NLL base - NLL ceiling). The ceiling is full retraining on the new backbone
where that row is there, otherwise the old backbone with its adapter, and the table says which.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
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
    """Return a row's mean over its seeds, with the ``spread`` of its likelihood; one run as it is.

    What some seeds were not asked for (generated answers take long) is the mean over the others.
    """
    if len(runs) == 1:
        return runs[0]
    told = {name: [run[name] for run in runs if name in run] for name in (*MEANS, *JUDGED)}
    means: dict[str, Any] = {name: statistics.mean(told[name]) for name in MEANS if told[name]}
    for name, interval in JUDGED.items():
        if told[name]:
            right = [statistics.mean(map(int, item)) for item in zip(*told[name], strict=True)]
            means |= {name: right, interval: wilson(sum(right), len(right))}
    return runs[0] | means | {"spread": f" ± {statistics.stdev(run['nll'] for run in runs):.3f} ({len(runs)})"}


def gap(row: dict[str, Any], base: dict[str, Any], ceiling: dict[str, Any]) -> float | None:
    """Share of the adapter's gain that a row recovers, None where the gain is too small."""
    gain = base["nll"] - ceiling["nll"]
    return (base["nll"] - row["nll"]) / gain if gain >= LEAST_GAIN else None


def percent(share: float | None) -> str:
    """Write a share in percent, without a sign where it rounds to nothing."""
    return "undefined" if share is None else f"{share:.0%}".replace("-0%", "0%")


@dataclass(frozen=True)
class Kind:
    """What a table shows of one kind of task, besides the likelihood."""

    told: str
    """Key of a row that was asked for this."""
    titles: tuple[str, ...]
    cells: Callable[[dict[str, Any], dict[str, Any]], list[str]]
    """A row and the base -> its cells."""


def _share(row: dict[str, Any], right: str = "right") -> str:
    """Share of items that are right, with its interval."""
    low, high = row[JUDGED[right]]
    values = [float(value) for value in row[right]]
    return f"{sum(values) / len(values):.3f} ({low:.2f}-{high:.2f})"


def _against(row: dict[str, Any], base: dict[str, Any], right: str = "right") -> str:
    """Difference of these shares from the base's, item by item, with its interval."""
    mean, lower, upper = paired(row[right], base[right])
    return f"{mean:+.3f} ({lower:+.3f} to {upper:+.3f})"


CHOICE = Kind(
    "exact", ("accuracy (95 % interval)", "against base, paired", "exact"),
    lambda row, base: [_share(row), _against(row, base), f"{row['exact']:.2f}"],
)  # fmt: skip
FACTS = Kind(
    "unseen_accuracy", ("accuracy (95 % interval)", "on prompted facts", "on facts that no given prompt asks for"),
    lambda row, base: [_share(row), f"{row['seen_accuracy']:.3f}", f"{row['unseen_accuracy']:.3f}"],
)  # fmt: skip
WRITTEN = Kind(
    "generated_right", ("generated answers right (95 % interval)", "against base, paired", "ended"),
    lambda row, base: [
        _share(row, "generated_right"), _against(row, base, "generated_right"), percent(row["generated_ended"])
    ],
)  # fmt: skip
KINDS = (WRITTEN, FACTS, CHOICE)


def grid(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown, all but its first column set to the right."""
    lines = [f"| {' | '.join(titles)} |", f"|---|{'---:|' * (len(titles) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def table(rows: dict[str, dict[str, Any]], ends: dict[str, dict[str, Any]], ceiling: str) -> str:
    """Return the rows in Markdown, worst first; ``ends`` has the base and the ceiling of the gain."""
    base = ends["base"]
    kind = next((kind for kind in KINDS if any(kind.told in row for row in rows.values())), CHOICE)
    titles = ["row", "NLL (± seeds)", "gap recovered", *kind.titles, "seconds"]
    lines = []
    for name, row in sorted(rows.items(), key=lambda pair: -pair[1]["nll"]):
        share = "-" if name in ("old", "old-adapted") else percent(gap(row, base, ends[ceiling]))
        more = kind.cells(row, base) if kind.told in row else ["-"] * len(kind.titles)
        likelihood = f"{row['nll']:.3f}{row.get('spread', '')}"
        lines.append([name, likelihood, share, *more, format(row["seconds"], ".0f")])
    return grid(titles, lines)


def pages(folder: Path, rows: dict[str, dict[str, Any]], ceiling: str) -> dict[Path, str]:
    """Return the tables of a benchmark by file: its rows, and those of an earlier state of the code."""
    earlier = load(folder / "earlier")
    told = f"{rows['base']['items']} items. The gap is that of the row {ceiling!r}."
    found = {folder / "table.md": f"{table(rows, rows, ceiling)}\n\n{told}\n"}
    return found | ({folder / "earlier" / "table.md": table(earlier, rows, ceiling) + "\n"} if earlier else {})


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
    """Read the arguments, write table.md beside the rows, and gap.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ceiling", help="row that counts as 100 %%")
    args = parser.parse_args()
    rows = load(args.folder)
    ceiling = args.ceiling or next((name for name in ("full", "old-adapted") if name in rows), None)
    if ceiling is None or "base" not in rows:
        raise SystemExit("the rows 'base' and 'full' (or 'old-adapted') are needed: measure them with gap.py")
    for path, text in pages(args.folder, rows, ceiling).items():
        path.write_text(text, encoding="utf-8")
        print(text)
    chart(rows, ceiling, args.folder / "gap.png")


if __name__ == "__main__":
    main()
