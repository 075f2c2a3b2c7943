"""Time and memory of upgrading against full retraining on the demo pair, as in Figure 1 of the LoRASuite paper.

    python benchmarks/demo_costs.py [--out benchmarks/results/demo_costs]

Every way runs in a process of its own. Seconds are the processor's, so that other work on the machine does not count,
and of the work alone (no imports, no scoring); memory is the largest resident memory, and what of it came on top of the
imported libraries, which on models this small are most of it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import stage
from demo_charts import costs
from demo_gap import quiet
from demo_pair import DemoPair, peak_mb, timed

TUNED = {"learning_rate": 3e-3, "warmup": 0.1}
WAYS: dict[str, Callable[[DemoPair], Any]] = {
    "full retraining, 2,000 samples": lambda pair: pair.full(),
    "vanilla LoRA, 100 samples": lambda pair: pair.vanilla(**TUNED),
    "lorasuite, without LFT": lambda pair: pair.upgraded("lorasuite"),
    "lorasuite + LFT (100)": lambda pair: pair.tuned(pair.upgraded("lorasuite", trainable=True), **TUNED),
    "transplant, without LFT": lambda pair: pair.upgraded("transplant"),
    "transplant + LFT (100)": lambda pair: pair.tuned(pair.upgraded("transplant", trainable=True), **TUNED),
    "distill, no labels": lambda pair: pair.upgraded("distill"),
}
"""What is compared; building the map, once per pair of backbones, is part of every upgrade here."""
PAPER = {
    "pair": "MiniCPM-S-1B to MiniCPM-2B, LoRASuite with LFT (100) against LoRA retraining (10k)",
    "seconds": -0.7823, "memory_gb": -5.5, "memory_gb_without_lft": -15.34,
}  # fmt: skip
FULL = "full retraining, 2,000 samples"


def one(name: str) -> dict[str, Any]:
    """Do one thing in this process and say what it took."""
    quiet()
    pair = DemoPair()
    _ = pair.new.load(dtype="float32"), pair.old.arch  # what every way reads once, and transformers' own imports
    held = peak_mb()
    start = time.process_time()
    _, _, peak = timed(lambda: WAYS[name](pair))
    return {"work_seconds": round(time.process_time() - start, 2), "peak_mb": peak, "added_mb": max(peak - held, 0)}


def spawned(name: str) -> dict[str, Any]:
    """Do it in a process of its own."""
    call = [sys.executable, "-W", "ignore", __file__, "--one", name]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Return the table in Markdown, with the paper's line."""
    full = rows[FULL]
    lines = [
        "| way | processor seconds | against full retraining | peak memory | against full retraining |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, row in rows.items():
        time, memory = row["work_seconds"] / full["work_seconds"] - 1, row["peak_mb"] - full["peak_mb"]
        lines.append(f"| {name} | {row['work_seconds']:.1f} | {time:+.0%} | {row['peak_mb']} MB | {memory:+d} MB |")
    lines.append(
        f"| *paper: {PAPER['pair']}* | | {PAPER['seconds']:.2%} | | {PAPER['memory_gb']} GB "
        f"(without LFT {PAPER['memory_gb_without_lft']} GB) |"
    )
    return "\n".join(lines)


def main() -> None:
    """Measure, write costs.json, table.md and costs.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "demo_costs")
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one)))
        return
    found = stage(args.out, "costs", lambda: {"ways": {name: spawned(name) for name in WAYS}, "paper": PAPER})
    text = table(found["ways"])
    (args.out / "table.md").write_text(text + "\n", encoding="utf-8")
    costs(found["ways"], FULL, PAPER["seconds"], args.out / "costs.png")
    print(text)


if __name__ == "__main__":
    main()
