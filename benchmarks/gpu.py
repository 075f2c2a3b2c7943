"""Everything on an accelerator, in one command of under nine minutes: correctness, time and peak memory.

    python benchmarks/gpu.py [--device cuda] [--parts demo,planted,llama,minicpm,qwen] [--out DIR]
    python benchmarks/gpu.py --device cpu --small

``demo``: the pair in the package, end to end, with the rows that the CPU's table has. ``planted``: upgrades whose right
adapter is known, in float32 and bfloat16. The others: random models of the shapes of Llama-2-7B and Llama-3-8B,
MiniCPM-S-1B and MiniCPM-2B, Qwen1.5-1.8B and Qwen2.5-3B, made on the device in bfloat16: time and peak memory of every
step, and the share of it in the models' own passes, beside a LoRA trained on 10,000 samples of 256 tokens, of which 20
steps are timed and scaled (Figure 1 of LoRASuite). ``--small`` divides the shapes, for a try on a CPU. Nothing is
downloaded, and neither datasets nor matplotlib is used.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, hide_loading_bars, write_json
from gpu_shapes import PAIRS, measure_pair

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
CHANGES = ("vocabulary", "widened hidden", "permuted heads", "units", "depth")
DEMO_ROWS = ("base", "old-adapted", "lorasuite", "transplant", "distill", "full")
CPU_LIMIT = {"float32": 1e-4, "bfloat16": 0.2}
"""Largest error in the logits, relative to the adapter's effect: models in bfloat16 round at every layer."""


def measure_demo(device: str, out: Path, *, small: bool) -> dict[str, Any]:
    """Run the demo pair's rows on the device."""
    from gap_demo import DemoRun

    run = DemoRun(out / "demo", device=device)
    names = DEMO_ROWS[:4] if small else DEMO_ROWS
    keys = ("nll", "accuracy", "made_seconds")
    return {name: {key: found[key] for key in keys} for name in names for found in [run.row(name)]}


@torch.no_grad()
def measure_planted(device: str, out: Path, *, small: bool) -> dict[str, Any]:
    """Upgrade planted pairs whose backbones run on the device."""
    from planted_run import Case, error

    families = ("llama", "gpt_neox") if small else ("llama", "qwen2", "gpt_neox", "phi3", "gemma2", "bloom")
    found: dict[str, Any] = {}
    for dtype, limit in CPU_LIMIT.items():
        errors = {}
        for family in families:
            with tempfile.TemporaryDirectory() as folder:
                errors[family] = error(Case(family, CHANGES), Path(folder), device=device, dtype=dtype)
        found[dtype] = {"errors": errors, "limit": limit, "within": max(errors.values()) < limit}
    return found


def describe(device: str) -> dict[str, Any]:
    """Return the name of the device and the versions."""
    from importlib.metadata import version

    module = getattr(torch, device.partition(":")[0], None)
    name = module.get_device_name() if hasattr(module, "get_device_name") else "CPU"
    versions = {package: version(package) for package in ("torch", "transformers", "peft", "accelerate", "scipy")}
    return {"device": name, "versions": versions, "date": time.strftime("%Y-%m-%d")}


def table(found: dict[str, dict[str, Any]]) -> str:
    """Return a Markdown table of the steps of all parts: seconds, peak memory, share in the models' passes."""
    lines = ["| part | step | seconds | peak GB | in the models | |", "|---|---|---:|---:|---:|---|"]
    for part, one in found.items():
        for name in DEMO_ROWS:
            if name in one:
                row = one[name]
                score = f"NLL {row['nll']:.3f}, accuracy {row['accuracy']:.3f}"
                lines.append(f"| {part} | {name} | {row['made_seconds']:.1f} | | | {score} |")
        for name in CPU_LIMIT:
            if name in one:
                error = max(one[name]["errors"].values())
                lines.append(f"| {part} | {name} | | | | largest error {error:.1e}, at most {one[name]['limit']:g} |")
        for name, step in one.get("steps", {}).items():
            scaled = f"scaled from {step['timed_steps']} steps" if "timed_steps" in step else ""
            figures = f"{step['seconds']:.1f} | {step['peak_gb']:.2f} | {step['in_models']:.0%}"
            lines.append(f"| {part} | {name} | {figures} | {scaled} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure the parts, write one JSON each and a table of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--parts", default=f"demo,planted,{','.join(PAIRS)}", help="comma-separated; all by default")
    parser.add_argument("--small", action="store_true", help="divide all sizes")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu", help="folder for JSON and table")
    args = parser.parse_args()
    hide_loading_bars()
    parts: dict[str, dict[str, Any]] = {}
    work: dict[str, Callable[..., dict[str, Any]]] = {"demo": measure_demo, "planted": measure_planted}
    for name in args.parts.split(","):
        if name not in (*work, *PAIRS):
            raise SystemExit(f"unknown part {name!r}; known: {', '.join([*work, *PAIRS])}")
        start = time.perf_counter()
        if name in work:
            found = work[name](args.device, args.out, small=args.small)
        else:
            found = measure_pair(name, args.device, small=args.small)
        seconds = round(time.perf_counter() - start, 1)
        write_json(
            args.out / f"{name}.json", {**describe(args.device), "small": args.small, "seconds": seconds} | found
        )
        print(f"{name}: {seconds} s", flush=True)
        parts[name] = found
        (args.out / "table.md").write_text(table(parts), encoding="utf-8")
    print(table(parts))


if __name__ == "__main__":
    main()
