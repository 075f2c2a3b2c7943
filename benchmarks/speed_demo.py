"""Time and memory of upgrading against full retraining on the demo pair, as in Figure 1 of the LoRASuite paper.

Every way runs in a process of its own. Seconds are the processor's, so that other work on the machine does not count,
and of the work alone (no imports, no scoring); memory is the largest resident memory, and how much of it was added to
the imported libraries, which are most of it for models this small.
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

from charts import costs
from common import hide_loading_bars
from demo_pair import DemoPair, peak_mb, timed

TUNED = {"learning_rate": 3e-3, "warmup": 0.1}
FULL = "full retraining, 2,000 samples"
WAYS: dict[str, Callable[[DemoPair], Any]] = {
    FULL: lambda pair: pair.full(),
    "vanilla LoRA, 100 samples": lambda pair: pair.vanilla(**TUNED),
    "lorasuite, without LFT": lambda pair: pair.upgraded("lorasuite"),
    "lorasuite + LFT (100)": lambda pair: pair.tuned(pair.upgraded("lorasuite", trainable=True), **TUNED),
    "transplant, without LFT": lambda pair: pair.upgraded("transplant"),
    "transplant + LFT (100)": lambda pair: pair.tuned(pair.upgraded("transplant", trainable=True), **TUNED),
    "distill, no labels": lambda pair: pair.upgraded("distill"),
}
"""What is compared; every upgrade includes building the map, which a pair of backbones needs once."""
PAPER = {
    "pair": "MiniCPM-S-1B to MiniCPM-2B, LoRASuite with LFT (100) against LoRA retraining (10k)",
    "seconds": -0.7823, "memory_gb": -5.5, "memory_gb_without_lft": -15.34,
}  # fmt: skip


def run_one(name: str) -> dict[str, Any]:
    """Run one way in this process and measure it."""
    hide_loading_bars()
    pair = DemoPair()
    _ = pair.new.load(dtype="float32"), pair.old.arch  # what every way loads once, with transformers' own imports
    before = peak_mb()
    start = time.process_time()
    _, _, peak = timed(lambda: WAYS[name](pair))
    return {"work_seconds": round(time.process_time() - start, 2), "peak_mb": peak, "added_mb": max(peak - before, 0)}


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Run every way in a process of its own."""
    del args
    ways = {}
    for name in WAYS:
        call = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("speed.py")), "--one", name]
        done = subprocess.run(call, capture_output=True, text=True, check=True)
        ways[name] = json.loads(done.stdout.splitlines()[-1])
    return {"ways": ways, "paper": PAPER}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Return the table in Markdown, with the paper's line."""
    full = rows[FULL]
    lines = [
        "| way | processor seconds | against full retraining | peak memory | against full retraining |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, row in rows.items():
        seconds, memory = row["work_seconds"] / full["work_seconds"] - 1, row["peak_mb"] - full["peak_mb"]
        lines.append(f"| {name} | {row['work_seconds']:.1f} | {seconds:+.0%} | {row['peak_mb']} MB | {memory:+d} MB |")
    lines.append(
        f"| *paper: {PAPER['pair']}* | | {PAPER['seconds']:.2%} | | {PAPER['memory_gb']} GB "
        f"(without LFT {PAPER['memory_gb_without_lft']} GB) |"
    )
    return "\n".join(lines)


def draw(found: dict[str, Any], out: Path) -> None:
    """Write demo.md and demo.png."""
    (out / "demo.md").write_text(table(found["ways"]) + "\n", encoding="utf-8")
    costs(found["ways"], FULL, PAPER["seconds"], out / "demo.png")
