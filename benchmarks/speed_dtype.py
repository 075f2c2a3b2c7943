"""Time and memory of `transplant` and `distill` in float32 and in bfloat16, by command."""

from __future__ import annotations

import argparse
import tempfile
from importlib import resources
from typing import Any

import torch
from common import GB, watch

from peft_lorasuite import Backbone, UpgradeMap

DTYPES = ("float32", "bfloat16")


def given_or_demo(args: argparse.Namespace) -> tuple[str, ...]:
    """Return the old backbone, the new one, the adapter and the prompts: those of the demo without a pair."""
    if args.old:
        return args.old, args.new, args.adapter, args.prompts
    data = resources.files("peft_lorasuite") / "data" / "demo"
    return tuple(str(data / name) for name in ("old", "new", "adapter", "prompts.json"))


def dtypes(args: argparse.Namespace) -> dict[str, Any]:
    """Upgrade in each dtype, on the given pair or on the demo pair; bfloat16 can be very slow without instructions."""
    with tempfile.TemporaryDirectory() as scratch:
        old, new, adapter, prompts = given_or_demo(args)
        words = ["--set", f"prompts={args.number}", *(["--prompts", prompts] if prompts else [])]
        UpgradeMap.build(old, new).save(f"{scratch}/map")
        call = ["-m", "peft_lorasuite", "upgrade", adapter, "--from", old, "--to", new, "--map", f"{scratch}/map"]
        runs = {
            f"{method}, {dtype}": watch(
                [*call, *words, "--method", method, "--dtype", dtype, "-o", f"{scratch}/{method}-{dtype}", "--quiet"]
            )
            for method in args.methods.split(",")
            for dtype in DTYPES
        }
    chosen = Backbone.open(new).running_dtype()
    parameters = Backbone.open(new).arch.parameter_count()
    return {
        "runs": runs, "auto": str(chosen.compute).removeprefix("torch."), "reason": chosen.reason,
        "new_gb_in_float32": round(4 * parameters / GB, 3), "threads": torch.get_num_threads(),
    }  # fmt: skip
