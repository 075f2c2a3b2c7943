"""Rows of the gap benchmark on the demo pair: every method, with three seeds where it matters.

Rows with "+lft" are fine-tuned on 100 labeled samples by the paper's recipe (learning rate 1e-3, no warm-up), those
with "+lft-tuned" at the rate of {3e-4, 1e-3, 3e-3}, with warm-up, that is best on development items; so is
"vanilla-tuned".
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, hide_loading_bars, stage, wilson
from demo_pair import METHODS, RATES, DemoPair, Made

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``gap.py demo``."""
    parser.add_argument("--out", type=Path, default=RESULTS / "demo_gap", help="folder for the rows' JSON")
    parser.add_argument("--rows", default=",".join(ROWS), help="comma-separated; all by default")


class DemoRun:
    """The demo pair, its development split, and the folder of the rows."""

    def __init__(self, out: Path, device: str | None = None) -> None:
        hide_loading_bars()
        self.out, self.pair, self.dev = out, DemoPair(device=device), DemoPair(dev=True, device=device)
        self.upgraded: Callable[[str, int], Callable[[bool], Made]] = cache(
            lambda row, seed: self.pair.upgrade_once(row, seed=seed)
        )
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
        for seed in seeds:
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
        if base not in METHODS:
            raise SystemExit(f"unknown row {base!r}; known: {', '.join(ROWS)}")
        if not tuned:
            return self.upgraded(base, seed)(False)
        how = LFT if tuned == "lft" else {"learning_rate": self.rate(f"{base}+{tuned}")[0], "warmup": 0.1}
        return self.pair.tuned(self.upgraded(base, seed)(True), seed=seed, **how)

    def _rate(self, name: str) -> tuple[float, dict[str, float]]:
        """Choose a learning rate on development items; also return the NLL of each."""
        base = name.partition("+")[0]
        start = self.dev.upgrade_once(base) if base in METHODS else None
        tries = {}
        for rate in RATES:
            how = {"learning_rate": rate, "warmup": 0.1}
            made = self.dev.tuned(start(True), **how) if start else self.dev.vanilla(**how)
            tries[rate] = self.dev.score(made.model)["nll"]
        return min(tries, key=tries.__getitem__), {str(rate): value for rate, value in tries.items()}


def _summary(runs: list[tuple[Made, dict[str, Any]]]) -> dict[str, Any]:
    """Return the means over the seeds; outcomes and report are the first seed's."""
    (first, score), *_ = runs
    scores = [found for _, found in runs]
    nll, accuracy = (statistics.fmean(found[key] for found in scores) for key in ("nll", "accuracy"))
    count = score["items"]
    row = {
        "nll": round(nll, 4), "accuracy": round(accuracy, 4), "items": count,
        "interval": wilson(round(accuracy * count), count), "exact": round(accuracy, 4), "right": score["right"],
        "seeds": [{key: found[key] for key in ("nll", "accuracy")} for found in scores],
        "made_seconds": round(statistics.fmean(made.seconds for made, _ in runs), 2),
        "peak_mb": max(made.peak_mb for made, _ in runs), "threads": torch.get_num_threads(),
    }  # fmt: skip
    return row | ({"report": first.report} if first.report else {})
