"""Sweeps and ablations on the demo pair, as in the LoRASuite paper: section 4.2, appendices A.3 and A.6.

    python benchmarks/sweeps.py [--only rank,rate,...] [--out benchmarks/results/demo_sweeps]

Every setting is scored on development items, as the mean of the seeds; the best one is scored on the test items once. A
sweep is one JSON file, a figure and a table; a file that is there is read, not measured again.
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
from charts import bars, lines
from common import RESULTS, hide_loading_bars, stage
from demo_pair import FULL, TEMPLATE, DemoPair, Made
from tables import gap, grid, percent

from peft_lorasuite import MapOptions
from peft_lorasuite.training.finetune import finetune

SEEDS = (0, 1, 2)
TUNED = {"learning_rate": 3e-3, "warmup": 0.1}
"""The best of {3e-4, 1e-3, 3e-3} on development items for vanilla LoRA and for both upgrades (gap.py demo)."""
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
Make = Callable[[DemoPair, int], Made]


@dataclass(frozen=True)
class Point:
    """One setting: ``make(pair, seed)`` returns the model that is scored."""

    series: str
    x: Any
    make: Make
    seeds: tuple[int, ...] = SEEDS


class Sources:
    """What the points start from, made once: adapters of the old backbone by rank and parts, and upgrades."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self._pair, self._upgrade = cache(self._make_pair), cache(self._make_upgrade)

    def pair(
        self, pair: DemoPair, rank: int = 16, parts: tuple[str, ...] = MODULES["q k v o gate up down"]
    ) -> DemoPair:
        """Return the pair of the same split with an adapter of this rank on these parts."""
        return self._pair(pair.dev, rank, parts)

    def start(self, pair: DemoPair, row: str, seed: int) -> Made:
        """Return the pair's own adapter upgraded by a method, trainable."""
        return self._upgrade(pair, row, seed)(True)

    def _make_pair(self, dev: bool, rank: int, parts: tuple[str, ...]) -> DemoPair:
        plain = DemoPair(dev=dev)
        folder = self.scratch / f"{dev}-{rank}-{'-'.join(parts)}"
        model = plain.fresh(rank, 2 * rank, parts, seed=7, old=True)
        finetune(model, plain.train, template=TEMPLATE, tokenizer=plain.old.tokenizer, seed=7, **FULL)
        model.save_pretrained(folder, save_embedding_layers=False)
        return DemoPair(adapter=folder, dev=dev)

    def _make_upgrade(self, pair: DemoPair, row: str, seed: int) -> Callable[[bool], Made]:
        return pair.upgrade_once(row, seed=seed)


def rank_sweep(sources: Sources) -> Iterator[Point]:
    """Yield points over the rank of the old adapter, of the upgrade and of the vanilla LoRA: section 4.2."""

    def upgraded(start: str, rank: int) -> Make:
        def make(pair: DemoPair, seed: int) -> Made:
            other, options = sources.pair(pair, rank), {"rank": rank} if start == "transplant" else {}
            return other.tuned(other.upgraded(start, trainable=True, seed=seed, **options), seed=seed, **TUNED)

        return make

    for rank in (4, 8, 16, 32):
        for start in STARTS:
            yield Point(f"{start}, then 100 samples", rank, upgraded(start, rank))
        yield Point(
            "distill (rank at least 16), no labels", rank,
            lambda p, seed, r=rank: sources.pair(p, r).upgraded("distill", seed=seed), SEEDS[:1],
        )  # fmt: skip
        yield Point("vanilla, 100 samples", rank, lambda p, seed, r=rank: p.vanilla(rank=r, seed=seed, **TUNED))
        yield Point(
            "full retraining", rank,
            lambda p, seed, r=rank: p.vanilla(rank=r, alpha=2 * r, seed=seed, **FULL), SEEDS[:1],
        )  # fmt: skip


def rate_sweep(sources: Sources) -> Iterator[Point]:
    """Yield points over the learning rate of the light fine-tuning: section 4.2."""
    for rate in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2):
        how = {"learning_rate": rate, "warmup": 0.1}
        for start in STARTS:
            yield Point(
                f"{start}, then 100 samples", rate,
                lambda p, seed, s=start, how=how: p.tuned(sources.start(p, s, seed), seed=seed, **how),
            )  # fmt: skip
        yield Point("vanilla, 100 samples", rate, lambda p, seed, how=how: p.vanilla(seed=seed, **how))


def data_sweep(sources: Sources) -> Iterator[Point]:
    """Yield points over the number of labeled samples: section 4.2."""
    for count in (100, 300, 1000):
        how = {"samples": count, **TUNED}
        for start in STARTS:
            yield Point(
                f"{start}, then N samples", count,
                lambda p, seed, s=start, how=how: p.tuned(sources.start(p, s, seed), seed=seed, **how),
            )  # fmt: skip
        yield Point("vanilla, N samples", count, lambda p, seed, how=how: p.vanilla(seed=seed, **how))


def module_sweep(sources: Sources) -> Iterator[Point]:
    """Yield points over the modules of the old adapter, the upgrade and the training: A.3."""

    def upgraded(start: str, parts: tuple[str, ...]) -> Make:
        def make(pair: DemoPair, seed: int) -> Made:
            other = sources.pair(pair, 16, parts)
            return other.tuned(other.upgraded(start, trainable=True, seed=seed), seed=seed, parts=parts, **TUNED)

        return make

    for name, parts in MODULES.items():
        for start in STARTS:
            yield Point(f"{start}, then 100 samples", name, upgraded(start, parts))
        yield Point("vanilla, 100 samples", name, lambda p, seed, q=parts: p.vanilla(seed=seed, parts=q, **TUNED))


def ablations(sources: Sources) -> Iterator[Point]:
    """Yield points over the layer map, similarity, head map and hidden map of lorasuite, with and without LFT: A.6."""
    del sources

    def upgraded(options: dict[str, str], *, tuned: bool) -> Make:
        def make(pair: DemoPair, seed: int) -> Made:
            built = pair.build(MapOptions(seed=seed, **options))
            found = pair.upgraded("lorasuite", trainable=tuned, seed=seed, upgrade_map=built)
            return pair.tuned(found, seed=seed, **TUNED) if tuned else found

        return make

    for group, choices in ABLATIONS.items():
        for name, options in choices:
            yield Point("lorasuite", f"{group}: {name}", upgraded(options, tuned=False))
            yield Point("lorasuite, then 100 samples", f"{group}: {name}", upgraded(options, tuned=True))


SWEEPS: dict[str, tuple[Callable[[Sources], Iterator[Point]], str, bool]] = {
    "rank": (rank_sweep, "rank of the adapter", True),
    "rate": (rate_sweep, "learning rate of the fine-tuning", True),
    "data": (data_sweep, "labeled samples", True),
    "modules": (module_sweep, "modules of the adapter", False),
    "ablations": (ablations, "how the map is built", False),
}
"""Sweep -> its points, the label of the axis, and whether that axis is numeric."""


def measure(points: list[Point], seeds: int, dev: DemoPair, test: DemoPair, ends: dict[str, Any]) -> dict[str, Any]:
    """Score all points on development items, and the best of every series on the test items."""
    points = [replace(point, seeds=point.seeds[:seeds]) for point in points]
    rows = []
    for point in points:
        row = {"series": point.series, "x": point.x} | _scored(point, dev, ends["dev"])
        rows.append(row)
        print(f"  {point.series} at {point.x}: {row['nll']:.3f} {row['seeds']}", flush=True)
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["series"] not in best or row["nll"] < best[row["series"]]["nll"]:
            best[row["series"]] = row
    chosen = [point for point in points if best[point.series]["x"] == point.x]
    scored = [{"series": point.series, "x": point.x} | _scored(point, test, ends["test"]) for point in chosen]
    threads = torch.get_num_threads()
    return {
        "split": "development items", "ends": ends, "points": rows, "best_on_test_items": scored, "threads": threads
    }  # fmt: skip


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


def table(found: dict[str, Any], *, across: bool) -> str:
    """Return a sweep in Markdown: gap recovered, a line for every series (``across``) or for every setting."""
    points, best = found["points"], {row["series"]: row for row in found["best_on_test_items"]}
    shares = {(row["series"], str(row["x"])): percent(row["gap_recovered"]) for row in points}
    shares |= {(name, BEST): f"{percent(row['gap_recovered'])} ({row['x']})" for name, row in best.items()}
    series, settings = (list(dict.fromkeys(key[place] for key in shares)) for place in (0, 1))
    rows, columns = (series, settings) if across else (settings, series)
    cells = ([row, *(shares[(row, column) if across else (column, row)] for column in columns)] for row in rows)
    return grid(["", *columns], cells)


def main() -> None:
    """Read the arguments, measure and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "demo_sweeps", help="folder for the results")
    parser.add_argument("--only", help=f"comma-separated (default: {','.join(SWEEPS)})", default=",".join(SWEEPS))
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="seeds of every point")
    args = parser.parse_args()
    hide_loading_bars()
    pairs = {"dev": DemoPair(dev=True), "test": DemoPair()}
    ends = stage(args.out, "ends", lambda: ends_of(pairs))
    with tempfile.TemporaryDirectory() as scratch:
        sources = Sources(Path(scratch))
        for name in args.only.split(","):
            points, label, numeric = SWEEPS[name]
            both = {key: ends[key] for key in pairs}
            found = stage(
                args.out, name, partial(measure, list(points(sources)), args.seeds, pairs["dev"], pairs["test"], both)
            )
            (lines if numeric else bars)(found, label, args.out / f"{name}.png")
            (args.out / f"{name}.md").write_text(table(found, across=numeric) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
