"""How good the target is that `transplant` fits and `distill` trains towards: what no fit to it can improve on.

    python benchmarks/targets.py --old OLD --new NEW --adapter ADAPTER --map MAP --task arc --data DIR \
        --out FILE.json

Development items are read with their reference answers; the target's likelihood of these is set beside the new
backbone's. Options: `teacher.teach` says what trust, share and gate are.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import load_task, stage

from peft_lorasuite import Backbone, UpgradeMap
from peft_lorasuite.adapter import read as read_adapter
from peft_lorasuite.answering import Turn
from peft_lorasuite.behaviour import tokens
from peft_lorasuite.methods.base import Job
from peft_lorasuite.methods.reading import Reading, ReadingOptions, read
from peft_lorasuite.progress import bars
from peft_lorasuite.prompts import fill
from peft_lorasuite.source import Source

CHOICES = {
    "difference alone": (0.0, 0.0, 0.0), "difference, gated": (0.0, 0.0, 0.5), "trust": (0.5, 0.0, 0.0),
    "both": (0.5, 0.0, 0.5), "share": (0.0, 0.5, 0.0), "old adapted": (0.0, 1.0, 0.0),
}  # fmt: skip
"""Name -> trust, share and gate."""
OPTIONS = ReadingOptions(memory=False, quiet=0, top=10**9, extra=0)
"""As many candidate tokens as there are."""


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the likelihood and the share of likeliest tokens of every target."""
    old, new = (Backbone.open(name, dtype=args.dtype) for name in (args.old, args.new))
    items = load_task(args.task, args.data, 1).dev[: args.items]
    turns = [Turn(fill(one), one.output, True) for one in items]
    adapter = read_adapter(Source(args.adapter, "adapter"), old.arch)
    reading = read(Job(adapter, UpgradeMap.load(args.map), old, new, progress=bars), OPTIONS, turns)
    ended = [(*tokens(new, turn).ids, new.tokenizer.eos_token_id) for turn in turns]
    labels = torch.tensor([ended[turn][position + 1] for turn, _, position in reading.places])

    def told(one: Reading, trust: float, share: float, gate: float) -> dict[str, float]:
        target = one.teacher(replace(OPTIONS, trust=trust, share=share), gate=gate, seed=0).target
        nll, hit = -target.gather(1, labels[:, None]).mean(), (target.argmax(-1) == labels).float().mean()
        return {"nll": round(float(nll), 4), "likeliest": round(float(hit), 4)}

    rows = {"new backbone": told(replace(reading, adapted=reading.plain), 0.0, 0.0, 0.0)}
    rows |= {name: told(reading, *how) for name, how in CHOICES.items()}
    return {"items": len(items), "positions": len(labels), "targets": rows}


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("old", "new", "adapter"):
        parser.add_argument(f"--{name}", required=True, help="folder or Hub id")
    parser.add_argument("--map", required=True, help="folder of the pair's upgrade map")
    parser.add_argument("--task", required=True, choices=("arc", "facts", "math"))
    parser.add_argument("--data", required=True, type=Path, help="folder with the LLM-Adapters files")
    parser.add_argument("--items", type=int, default=40, help="development items")
    parser.add_argument("--dtype", default="auto", help="of the models")
    parser.add_argument("--out", required=True, type=Path, help="JSON file")
    args = parser.parse_args()
    stage(args.out.parent, args.out.stem, lambda: measure(args))


if __name__ == "__main__":
    main()
