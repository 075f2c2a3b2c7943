"""Sweeps and ablations on the demo pair, as in the LoRASuite paper: section 4.2, appendices A.3 and A.6.

    python benchmarks/demo_sweeps.py [--only rank,rate,...] [--out benchmarks/results/demo_sweeps]

Every setting is judged on development items, the mean of the seeds; what was best there is scored on the test items
once. A sweep is one JSON file, a figure and a table; a file that is there is read, not measured again.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from common import stage
from demo_charts import bars, lines
from demo_gap import quiet
from demo_pair import FULL, TEMPLATE, DemoPair, Made
from table import gap, grid, percent

from peft_lorasuite import MapOptions
from peft_lorasuite.training.finetune import finetune

SEEDS = (0, 1, 2)
TUNED = {"learning_rate": 3e-3, "warmup": 0.1}
"""The best of {3e-4, 1e-3, 3e-3} on development items for vanilla LoRA and for both upgrades (demo_gap.py chose so)."""
STARTS = ("lorasuite", "transplant")
"""The paper's method and ours; both are followed by fine-tuning on 100 samples."""
BEST = "best, on test items"
MODULES = {
    "q v": ("q", "v"), "q k v o": ("q", "k", "v", "o"), "gate up down": ("gate", "up", "down"),
    "q k v o gate up down": ("q", "k", "v", "o", "gate", "up", "down"),
}  # fmt: skip
ABLATIONS = {
    "layer map": [("cka", {}), *((name, {"layer_map": name}) for name in ("first", "medium", "last", "proportional"))],
    "similarity": [("cka", {}), *((name, {"similarity": name}) for name in ("cca", "pwcca", "procrustes"))],
    "head map": [("hungarian", {}), ("index", {"head_map": "index"})],
    "hidden map": [("embeddings", {}), ("polar", {"hidden_map": "polar"})],
}
"""Group -> choices; the first is the default. The identity needs equal hidden sizes, which this pair does not have."""


@dataclass(frozen=True)
class Point:
    """One setting: ``make(pair, seed)`` gives the model that is scored."""

    series: str
    x: Any
    make: Callable[[DemoPair, int], Made]
    seeds: tuple[int, ...] = SEEDS


class Old:
    """Adapters of the old backbone, trained once for every split, rank and choice of modules."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.pair = cache(self._pair)

    def _pair(self, dev: bool, rank: int, parts: tuple[str, ...]) -> DemoPair:
        """Return the pair with an adapter of this rank on these parts."""
        plain = DemoPair(dev=dev)
        folder = self.scratch / f"{dev}-{rank}-{'-'.join(parts)}"
        model = plain.fresh(rank, 2 * rank, parts, seed=7, old=True)
        finetune(model, plain.train, template=TEMPLATE, tokenizer=plain.old.tokenizer, seed=7, **FULL)
        model.save_pretrained(folder, save_embedding_layers=False)
        return DemoPair(adapter=folder, dev=dev)

    def of(self, pair: DemoPair, rank: int = 16, parts: tuple[str, ...] = MODULES["q k v o gate up down"]) -> DemoPair:
        """Return the pair of the same split with another adapter."""
        return self.pair(pair.dev, rank, parts)


def rank_sweep(old: Old) -> Iterator[Point]:
    """Yield points over the rank of the old adapter, of the upgrade and of the vanilla LoRA: section 4.2."""
    for rank in (4, 8, 16, 32):

        def tuned(pair: DemoPair, seed: int, start: str, rank: int = rank) -> Made:
            other, options = old.of(pair, rank), {"rank": rank} if start == "transplant" else {}
            made = other.upgraded(start, trainable=True, seed=seed, **options)
            return other.tuned(made, seed=seed, **TUNED)

        def distilled(pair: DemoPair, seed: int, rank: int = rank) -> Made:
            return old.of(pair, rank).upgraded("distill", seed=seed)

        for start in STARTS:
            yield Point(f"{start}, then 100 samples", rank, lambda pair, seed, s=start, f=tuned: f(pair, seed, s))
        yield Point("distill (rank at least 16), no labels", rank, distilled, SEEDS[:1])
        yield Point("vanilla, 100 samples", rank, lambda p, seed, r=rank: p.vanilla(rank=r, seed=seed, **TUNED))
        yield Point(
            "full retraining",
            rank,
            lambda p, seed, r=rank: p.vanilla(rank=r, alpha=2 * r, seed=seed, **FULL),
            SEEDS[:1],
        )


def rate_sweep(old: Old) -> Iterator[Point]:
    """Yield points over the learning rate of the light fine-tuning: section 4.2."""
    del old
    for rate in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2):
        for start in STARTS:
            yield Point(
                f"{start}, then 100 samples", rate,
                lambda p, seed, s=start, r=rate: p.tuned(
                    started(p, s, seed), seed=seed, learning_rate=r, warmup=0.1
                ),
            )  # fmt: skip
        yield Point(
            "vanilla, 100 samples", rate, lambda p, seed, r=rate: p.vanilla(seed=seed, learning_rate=r, warmup=0.1)
        )


def data_sweep(old: Old) -> Iterator[Point]:
    """Yield points over the number of labelled samples: section 4.2."""
    del old
    for count in (100, 300, 1000):
        for start in STARTS:
            yield Point(
                f"{start}, then N samples", count,
                lambda p, seed, s=start, n=count: p.tuned(started(p, s, seed), seed=seed, samples=n, **TUNED),
            )  # fmt: skip
        yield Point("vanilla, N samples", count, lambda p, seed, n=count: p.vanilla(seed=seed, samples=n, **TUNED))


def module_sweep(old: Old) -> Iterator[Point]:
    """Yield points over the modules that the old adapter, the upgrade and the training have: A.3."""
    for name, parts in MODULES.items():
        for start in STARTS:

            def tuned(pair: DemoPair, seed: int, start: str = start, parts: Any = parts) -> Made:
                other = old.of(pair, 16, parts)
                made = other.upgraded(start, trainable=True, seed=seed)
                return other.tuned(made, seed=seed, parts=parts, **TUNED)

            yield Point(f"{start}, then 100 samples", name, tuned)
        yield Point(
            "vanilla, 100 samples", name, lambda p, seed, parts=parts: p.vanilla(seed=seed, parts=parts, **TUNED)
        )


def ablations(old: Old) -> Iterator[Point]:
    """Yield points over the layer map, similarity, head map and hidden map of lorasuite, with and without LFT: A.6."""
    del old
    for group, choices in ABLATIONS.items():
        for name, options in choices:

            def plain(pair: DemoPair, seed: int, options: Any = options, trainable: bool = False) -> Made:
                built = pair.build(MapOptions(seed=seed, **options))
                return pair.upgraded("lorasuite", trainable=trainable, seed=seed, upgrade_map=built)

            yield Point("lorasuite", f"{group}: {name}", plain)
            yield Point(
                "lorasuite, then 100 samples", f"{group}: {name}",
                lambda p, seed, f=plain: p.tuned(f(p, seed, trainable=True), seed=seed, **TUNED),
            )  # fmt: skip


def started(pair: DemoPair, start: str, seed: int) -> Made:
    """Return an upgraded adapter, ready to train; the upgrade itself is made once."""
    key = (start, seed)
    if key not in pair.starts:
        pair.starts[key] = pair.kept(start, seed=seed)
    return pair.starts[key](True)


SWEEPS: dict[str, tuple[Callable[[Old], Iterator[Point]], str, str]] = {
    "rank": (rank_sweep, "rank of the adapter", "log"),
    "rate": (rate_sweep, "learning rate of the fine-tuning", "log"),
    "data": (data_sweep, "labelled samples", "log"),
    "modules": (module_sweep, "modules of the adapter", "words"),
    "ablations": (ablations, "how the map is built", "words"),
}
"""Sweep -> its points, what is swept, and the kind of that axis."""


def measure(points: list[Point], seeds: int, dev: DemoPair, test: DemoPair, ends: dict[str, Any]) -> dict[str, Any]:
    """Score all points on development items, and the best of every series on the test items."""
    points = [replace(point, seeds=point.seeds[:seeds]) for point in points]
    rows = []
    for point in points:
        row = {"series": point.series, "x": point.x} | _scored(point, dev, ends["dev"])
        rows.append(row)
        print(f"  {point.series} at {point.x}: {row['nll']:.3f} {row['seeds']}", flush=True)
    best = {}
    for row in rows:
        if row["series"] not in best or row["nll"] < best[row["series"]]["nll"]:
            best[row["series"]] = row
    chosen = [point for point in points if best[point.series]["x"] == point.x]
    scored = [{"series": point.series, "x": point.x} | _scored(point, test, ends["test"]) for point in chosen]
    return {
        "split": "development items",
        "ends": ends,
        "points": rows,
        "best_on_test_items": scored,
        "threads": torch.get_num_threads(),
    }


def _scored(point: Point, pair: DemoPair, ends: dict[str, float]) -> dict[str, Any]:
    found = [pair.score(point.make(pair, seed).model) for seed in point.seeds]
    nll = statistics.fmean(score["nll"] for score in found)
    share = gap({"nll": nll}, {"nll": ends["base"]}, {"nll": ends["full"]})
    return {
        "nll": round(nll, 4), "accuracy": round(statistics.fmean(score["accuracy"] for score in found), 4),
        "gap_recovered": None if share is None else round(share, 4), "seeds": [score["nll"] for score in found],
    }  # fmt: skip


def ends_of(pairs: dict[str, DemoPair]) -> dict[str, Any]:
    """Score the new base and full retraining on both splits: 0 and 100 % of the gap."""
    found = {}
    for split, pair in pairs.items():
        base = pair.score(pair.new.load(dtype="float32"))["nll"]
        found[split] = {"base": base, "full": statistics.fmean(pair.score(pair.full(s).model)["nll"] for s in SEEDS)}
    return found


def table(found: dict[str, Any], down: bool) -> str:
    """Return a sweep in Markdown: gap recovered, the series along the rows, or ``down`` the columns."""
    points, best = found["points"], {row["series"]: row for row in found["best_on_test_items"]}
    shares = {(row["series"], str(row["x"])): percent(row["gap_recovered"]) for row in points}
    shares |= {(name, BEST): f"{percent(row['gap_recovered'])} ({row['x']})" for name, row in best.items()}
    series, settings = (list(dict.fromkeys(key[place] for key in shares)) for place in (0, 1))
    rows, columns = (settings, series) if down else (series, settings)
    cells = ([row, *(shares[(column, row) if down else (row, column)] for column in columns)] for row in rows)
    return grid(["", *columns], cells)


def main() -> None:
    """Read the arguments, measure and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "demo_sweeps")
    parser.add_argument("--only", help="comma-separated; all by default", default=",".join(SWEEPS))
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="seeds of every point")
    args = parser.parse_args()
    quiet()
    pairs = {"dev": DemoPair(dev=True), "test": DemoPair()}
    ends = stage(args.out, "ends", lambda: ends_of(pairs))
    with tempfile.TemporaryDirectory() as scratch:
        old = Old(Path(scratch))
        for name in args.only.split(","):
            points, label, axis = SWEEPS[name]
            settled = {key: ends[key] for key in pairs}
            work = partial(measure, list(points(old)), args.seeds, pairs["dev"], pairs["test"], settled)
            found = stage(args.out, name, work)
            (bars if axis == "words" else lines)(found, label, args.out / f"{name}.png")
            (args.out / f"{name}.md").write_text(table(found, axis == "words") + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
