"""How much of the adapter's gain arrives on the demo pair: every method, in a few minutes, from the package alone.

    python benchmarks/demo_gap.py [--out benchmarks/results/demo_gap] [--rows base,full,transplant,...]

The rows of gap.py and some more. Rows with "+lft" are fine-tuned on 100 labelled samples by the paper's recipe
(learning rate 1e-3, no warm-up), those with "+lft-tuned" at the rate of {3e-4, 1e-3, 3e-3}, with warm-up, that serves
best on development items; so is "vanilla-tuned". Every row is JSON of its own, which is read where it is there.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from common import machine, stage, wilson
from demo_pair import METHODS, RATES, DemoPair, Made, best_rate
from table import gap, load, percent

SEEDS = (0, 1, 2)
BEST = ("transplant", "distill")
"""The two methods that were best on development items: they and what builds on them run with three seeds."""
PAPER = {"learning_rate": 3e-4, "warmup": 0.1}
"""Vanilla LoRA as the paper trains it."""
LFT = {"learning_rate": 1e-3, "warmup": 0.0}
"""Light fine-tuning as the paper does it."""
ROWS = (
    "base", "old", "old-adapted", "full", *METHODS, "vanilla-paper", "vanilla-tuned",
    *(f"{name}+lft" for name in METHODS), "lorasuite+lft-tuned", "transplant+lft-tuned",
)  # fmt: skip


class Run:
    """The demo pair, for choices its development split, and where the rows are kept."""

    def __init__(self, out: Path) -> None:
        self.out, self.pair, self.dev = out, DemoPair(), DemoPair(dev=True)
        self.carried = cache(self._carried)
        self.rate = cache(self._rate)

    def row(self, name: str) -> dict[str, Any]:
        """Measure one row, or read it."""
        return stage(self.out, name, lambda: self.measure(name))

    def measure(self, name: str) -> dict[str, Any]:
        """Make the row's model with every seed, and score it on the test items."""
        if name in ("old", "old-adapted"):
            model = self.pair.adapted() if name == "old-adapted" else self.pair.old.load(dtype="float32")
            return _summary([(Made(model), self.pair.score(model, old=True))])
        base, _, tuned = name.partition("+")
        seeds = SEEDS if base in (*BEST, "full") or name.startswith("vanilla") else SEEDS[:1]
        runs = []
        for seed in seeds if "built-in" not in name else SEEDS[:1]:
            made = self.made(base, seed, tuned)
            runs.append((made, self.pair.score(made.model)))
        chosen = {"rate": self.rate(name)[0], "dev_nll": self.rate(name)[1]} if name.endswith("tuned") else {}
        return _summary(runs) | chosen

    def made(self, base: str, seed: int, tuned: str) -> Made:
        """Return the model of a row."""
        if base == "base":
            return Made(self.pair.new.load(dtype="float32"))
        if base == "full":
            return self.pair.full(seed)
        if base == "vanilla-paper":
            return self.pair.vanilla(seed=seed, **PAPER)
        if base == "vanilla-tuned":
            return self.pair.vanilla(seed=seed, learning_rate=self.rate(base)[0], warmup=0.1)
        if not tuned:
            return self.carried(base, seed)(False)
        how = LFT if tuned == "lft" else {"learning_rate": self.rate(f"{base}+{tuned}")[0], "warmup": 0.1}
        return self.pair.tuned(self.carried(base, seed)(True), seed=seed, **how)

    def _carried(self, row: str, seed: int) -> Callable[[bool], Made]:
        """Upgrade once, for the row and the one with fine-tuning behind it."""
        return self.pair.kept(row, seed=seed)

    def _rate(self, name: str) -> tuple[float, dict[str, float]]:
        """Choose a learning rate on development items; also return what each gave there."""
        base = name.partition("+")[0]
        start = self.dev.kept(base) if base in METHODS else None
        tries = {}
        for rate in RATES:
            how = {"learning_rate": rate, "warmup": 0.1}
            made = self.dev.tuned(start(True), **how) if start else self.dev.vanilla(**how)
            tries[rate] = self.dev.score(made.model)["nll"]
        return best_rate(tries), {str(rate): value for rate, value in tries.items()}


def _summary(runs: list[tuple[Made, dict[str, Any]]]) -> dict[str, Any]:
    """Means over the seeds; items, outcomes and report are the first seed's."""
    (first, score), *_ = runs
    scores = [found for _, found in runs]
    nll, accuracy = (statistics.fmean(found[key] for found in scores) for key in ("nll", "accuracy"))
    count = score["items"]
    told = {
        "nll": round(nll, 4), "accuracy": round(accuracy, 4), "items": count,
        "interval": wilson(round(accuracy * count), count), "exact": round(accuracy, 4), "right": score["right"],
        "seeds": [{key: found[key] for key in ("nll", "accuracy")} for found in scores],
        "made_seconds": round(statistics.fmean(made.seconds for made, _ in runs), 2),
        "peak_mb": max(made.peak_mb for made, _ in runs), "threads": torch.get_num_threads(),
    }  # fmt: skip
    return told | ({"report": first.report} if first.report else {})


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Return the table in Markdown, worst row first; the gap is that of full retraining."""
    lines = [
        "| row | NLL (± over seeds) | gap recovered | accuracy (95 % interval) | made in | peak memory |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in sorted(rows.items(), key=lambda pair: -pair[1]["nll"]):
        told = "-" if name in ("old", "old-adapted") else percent(gap(row, rows["base"], rows["full"]))
        values = [seed["nll"] for seed in row["seeds"]]
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        low, high = row["interval"]
        took = f"{row['made_seconds']:.1f} s | {row['peak_mb']} MB" if row["peak_mb"] else "- | -"
        lines.append(
            f"| {name} | {row['nll']:.3f}{spread} | {told} | {row['accuracy']:.3f} ({low:.2f}-{high:.2f}) | {took} |"
        )
    base, whole = rows["base"], sum(row["seconds"] for row in rows.values())
    foot = f"{base['items']} test items. The whole table took {whole:.0f} s with {base['threads']} thread(s)."
    return "\n".join([*lines, "", foot])


def chart(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw the shares as bars, with a line for every seed's own value."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    base, full = rows["base"], rows["full"]
    names = [name for name in rows if name not in ("base", "old", "old-adapted")]
    shares = {name: gap(rows[name], base, full) for name in names}
    shown = sorted((share, name) for name, share in shares.items() if share is not None)
    figure, axes = plt.subplots(figsize=(8, 0.32 * len(shown) + 1), layout="constrained")
    colours = [
        "tab:orange" if name.startswith("vanilla") else "tab:green" if name == "full" else
        "tab:blue" if "+" in name else "0.6" for _, name in shown
    ]  # fmt: skip
    bars = axes.barh([name for _, name in shown], [100 * share for share, _ in shown], color=colours)
    axes.bar_label(bars, fmt="%.0f %%", padding=10, fontsize=8)
    for place, (_, name) in enumerate(shown):
        each = [100 * (gap(seed, base, full) or 0) for seed in rows[name]["seeds"]]
        axes.plot(each, [place] * len(each), "|", color="black")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("gap recovered (% of full retraining's gain in NLL)\ngrey: no labels; blue: with 100 samples")
    axes.margins(x=0.12, y=0.01)
    figure.savefig(path, dpi=110)


def quiet() -> None:
    """Keep transformers from drawing a bar for every model that is loaded."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def main() -> None:
    """Read the arguments, measure the rows, write table.md and gap.png beside them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "demo_gap")
    parser.add_argument("--rows", help="comma-separated; all by default", default=",".join(ROWS))
    args = parser.parse_args()
    quiet()
    start, run = time.perf_counter(), Run(args.out)
    for name in args.rows.split(","):
        run.row(name.strip())
    rows = load(args.out)
    if {"base", "full"} <= rows.keys():
        text = table(rows)
        (args.out / "table.md").write_text(text + "\n", encoding="utf-8")
        chart(rows, args.out / "gap.png")
        print(text)
    print(f"{time.perf_counter() - start:.0f} s, {machine()['load_average']} processes waiting")


if __name__ == "__main__":
    main()
