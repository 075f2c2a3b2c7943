"""Make the table (Markdown) and the bar chart (PNG) of a gap benchmark from its rows.

    python benchmarks/tables.py FOLDER [--ceiling ROW]   # table.md and gap.png beside the rows of gap.py
    python benchmarks/tables.py                          # of all committed rows, and put into README.md and HISTORY.md

Rows of further seeds are in folders seed1, seed2 ... below (gap.py --seed 1 --out DIR/seed1); the table has means. Rows
of an earlier state of the code are in archive/NAME beside the folder NAME; they have a table of their own.
Gap recovered = (NLL base - NLL row) / (NLL base - NLL ceiling). The ceiling is full retraining on the new backbone, or
without that row the old backbone with its adapter; the table says which.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import RESULTS, paired, wilson

Row = dict[str, Any]
MEANS = (
    "nll", "accuracy", "exact", "seen_accuracy", "unseen_accuracy", "generated_accuracy", "generated_ended", "seconds"
)  # fmt: skip
OUTCOMES = {"right": "interval", "generated_right": "generated_interval"}
"""Outcomes per item -> the interval of their mean."""
LEAST_GAIN = 0.1
"""Gain of the ceiling, in nats, below which the gap recovered is undefined."""
COMMITTED = {
    "demo_gap": "demo pair", "arc": "A: answer format", "pair_b": "B: answer format", "facts": "A: facts",
    "math": "A: chains of thought",
}  # fmt: skip
"""Folder of results -> title in the summary."""
BEST_VANILLA = {"demo_gap": "tuned", "arc": "1e-3", "pair_b": "3e-4", "facts": "3e-3", "math": "1e-3"}
"""Folder -> the learning rate of a fresh LoRA that was best on development items."""
SUMMARY = {
    "base, nothing added": ("base",), "`copy`": ("copy",), "`cross-lora`": ("cross-lora",),
    "`lorasuite`": ("lorasuite",), "`transplant`, built-in prompts": ("transplant-built-in-prompts",),
    "`transplant`, prompts of the task": ("transplant-elicited", "transplant"), "`distill`": ("distill",),
    "fresh LoRA, 100 labeled samples": ("vanilla",),
    "`transplant`, then the same 100": ("transplant-elicited+lft", "transplant+lft-tuned", "transplant+lft"),
    "full retraining": ("full",), "old backbone with its adapter": ("old-adapted",),
}  # fmt: skip
"""Line of the summary -> rows; the first that a folder has is shown."""


def load(folder: Path) -> dict[str, Row]:
    """Read the rows of a benchmark, each the mean over its seeds."""
    rows = {}
    for path in sorted(folder.glob("*.json")):
        files = [path, *sorted(folder.glob(f"seed*/{path.name}"))]
        rows[path.stem] = average([json.loads(file.read_text(encoding="utf-8")) for file in files])
    return rows


def average(runs: list[Row]) -> Row:
    """Return a row's mean over its seeds; a single run as it is.

    What some seeds did not measure (generated answers take long) is the mean over the others.
    """
    if len(runs) == 1:
        return runs[0]
    values = {name: [run[name] for run in runs if name in run] for name in (*MEANS, *OUTCOMES)}
    means: Row = {name: statistics.mean(values[name]) for name in MEANS if values[name]}
    for name, interval in OUTCOMES.items():
        if values[name]:
            right = [statistics.mean(map(int, item)) for item in zip(*values[name], strict=True)]
            means |= {name: right, interval: wilson(sum(right), len(right))}
    return runs[0] | means | {"seeds": [{"nll": run["nll"]} for run in runs]}


def gap(row: Row, base: Row, ceiling: Row) -> float | None:
    """Return the share of the adapter's gain that a row recovers, None where the gain is too small."""
    gain = base["nll"] - ceiling["nll"]
    return (base["nll"] - row["nll"]) / gain if gain >= LEAST_GAIN else None


def percent(share: float | None) -> str:
    """Write a share in percent, without a sign where it rounds to zero."""
    return "undefined" if share is None else f"{share:.0%}".replace("-0%", "0%")


@dataclass(frozen=True)
class Kind:
    """Columns of a kind of task, besides the likelihood.

    Attributes:
        key: Key that the rows of this kind have.
        titles: Titles of the columns.
        cells: Function from a row and the base to its cells.
    """

    key: str
    titles: tuple[str, ...]
    cells: Callable[[Row, Row], list[str]]


def _share(row: Row, right: str = "right") -> str:
    """Write the share of items that are right, with its interval."""
    low, high = row[OUTCOMES[right]]
    values = [float(value) for value in row[right]]
    return f"{sum(values) / len(values):.3f} ({low:.2f}-{high:.2f})"


def _against(row: Row, base: Row, right: str = "right") -> str:
    """Write the paired difference of these shares from the base's, with its interval."""
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
GENERATED = Kind(
    "generated_right", ("generated answers right (95 % interval)", "against base, paired", "ended"),
    lambda row, base: [
        _share(row, "generated_right"), _against(row, base, "generated_right"), percent(row["generated_ended"])
    ],
)  # fmt: skip
DEMO = Kind(
    "made_seconds", ("accuracy (95 % interval)", "made in", "peak memory"),
    lambda row, base: [
        "{:.3f} ({:.2f}-{:.2f})".format(row["accuracy"], *row["interval"]),
        *([f"{row['made_seconds']:.1f} s", f"{row['peak_mb']} MB"] if row["peak_mb"] else ["-", "-"]),
    ],
)  # fmt: skip
KINDS = (DEMO, GENERATED, FACTS, CHOICE)


def grid(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown, all but its first column set to the right."""
    lines = [f"| {' | '.join(titles)} |", f"|---|{'---:|' * (len(titles) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def table(rows: dict[str, Row], ends: dict[str, Row], ceiling: str) -> str:
    """Return the rows in Markdown, worst first; ``ends`` has the base and the ceiling of the gain."""
    base = ends["base"]
    kind = next((kind for kind in KINDS if any(kind.key in row for row in rows.values())), CHOICE)
    titles = ["row", "NLL (± seeds)", "gap recovered", *kind.titles, "seconds"]
    lines = []
    for name, row in sorted(rows.items(), key=lambda pair: -pair[1]["nll"]):
        share = "-" if name in ("old", "old-adapted") else percent(gap(row, base, ends[ceiling]))
        more = kind.cells(row, base) if kind.key in row else ["-"] * len(kind.titles)
        values = [seed["nll"] for seed in row.get("seeds", [])]
        spread = f" ± {statistics.stdev(values):.3f} ({len(values)})" if len(values) > 1 else ""
        lines.append([name, f"{row['nll']:.3f}{spread}", share, *more, format(row["seconds"], ".0f")])
    return grid(titles, lines)


def tables(folder: Path, rows: dict[str, Row], ceiling: str) -> dict[Path, str]:
    """Return the tables of a benchmark by file: its rows, and its archived rows."""
    old = folder.parent / "archive" / folder.name
    archived = load(old)
    foot = f"{rows['base']['items']} items. The gap is that of the row {ceiling!r}."
    found = {folder / "table.md": f"{table(rows, rows, ceiling)}\n\n{foot}\n"}
    return found | ({old / "table.md": table(archived, rows, ceiling) + "\n"} if archived else {})


def summary(results: Path) -> str:
    """Return the committed benchmarks side by side: likelihood, gap recovered and accuracy."""
    found = {name: load(results / name) for name in COMMITTED}
    lines = ([line, *(_cell(rows, _pick(name, rows, keys)) for name, rows in found.items())]
             for line, keys in SUMMARY.items())  # fmt: skip
    return grid(["NLL (gap recovered), accuracy", *COMMITTED.values()], lines) + "\n"


def _pick(folder: str, rows: dict[str, Row], keys: Iterable[str]) -> str | None:
    """Return the first of some rows that a folder has."""
    names = (f"vanilla-{BEST_VANILLA[folder]}" if key == "vanilla" else key for key in keys)
    return next((name for name in names if name in rows), None)


def _cell(rows: dict[str, Row], name: str | None) -> str:
    """Write a row: its likelihood, the gap recovered, and its accuracy (of prompted facts and of others)."""
    if name is None:
        return "-"
    row, base = rows[name], rows["base"]
    share = "" if name == "old-adapted" else f" ({percent(gap(row, base, rows['full']))})"
    key = "generated_accuracy" if "generated_accuracy" in base else "accuracy"
    accuracy = f", {row[key]:.3f}" if key in row else ""
    if "unseen_accuracy" in row:
        accuracy = f", {row['seen_accuracy']:.2f} and {row['unseen_accuracy']:.2f}"
    return f"{row['nll']:.3f}{share}{accuracy}"


def chart(rows: dict[str, Row], ceiling: str, path: Path) -> None:
    """Draw the gap recovered as bars, with a mark for every seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    base, top = rows["base"], rows[ceiling]
    shares = {name: gap(row, base, top) for name, row in rows.items() if not name.startswith("old") and name != "base"}
    shown = sorted((share, name) for name, share in shares.items() if share is not None)
    colors = [
        "tab:orange" if name.startswith("vanilla") else "tab:green" if name == "full" else
        "tab:blue" if "+" in name else "0.6" for _, name in shown
    ]  # fmt: skip
    figure, axes = plt.subplots(figsize=(8, 0.32 * len(shown) + 1), layout="constrained")
    bars = axes.barh([name for _, name in shown], [100 * share for share, _ in shown], color=colors)
    axes.bar_label(bars, fmt="%.0f %%", padding=10, fontsize=8)
    for place, (_, name) in enumerate(shown):
        each = [100 * (gap(seed, base, top) or 0) for seed in rows[name].get("seeds", [])]
        axes.plot(each, [place] * len(each), "|", color="black")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("gap recovered (% of the adapter's gain in NLL)\ngray: no labels; blue: with 100 samples")
    axes.margins(x=0.15, y=0.01)
    figure.savefig(path, dpi=110)
    plt.close(figure)


MARKED = re.compile(r"(?<=<!-- )(?P<file>results/\S+\.md) -->\n.*?(?=\n<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """Return a page with the tables that its marks name, as they are on disk."""

    def put(found: re.Match[str]) -> str:
        return f"{found['file']} -->\n\n{(RESULTS.parent / found['file']).read_text(encoding='utf-8')}"

    return MARKED.sub(put, text)


def write(folder: Path, ceiling: str | None) -> None:
    """Write the tables and the chart of a folder."""
    rows = load(folder)
    ceiling = ceiling or next((name for name in ("full", "old-adapted") if name in rows), None)
    if ceiling is None or "base" not in rows:
        raise SystemExit("the rows 'base' and 'full' (or 'old-adapted') are needed: measure them with gap.py")
    for path, text in tables(folder, rows, ceiling).items():
        path.write_text(text, encoding="utf-8")
    chart(rows, ceiling, folder / "gap.png")
    print((folder / "table.md").read_text(encoding="utf-8"))


def main() -> None:
    """Read the arguments, write the tables and charts, and fill the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="*", help="folders of rows; by default the committed ones")
    parser.add_argument("--ceiling", help="row that counts as 100 %%")
    args = parser.parse_args()
    for folder in args.folder or [RESULTS / name for name in COMMITTED]:
        write(folder, args.ceiling)
    if not args.folder:
        (RESULTS / "summary.md").write_text(summary(RESULTS), encoding="utf-8")
        for page in (RESULTS.parent / name for name in ("README.md", "HISTORY.md")):
            page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
