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

from common import stage
from reading_study import arguments, opened, read_items

from peft_lorasuite.methods.behavior.probe import Reading, ReadingOptions

CHOICES = {
    "difference alone": (0.0, 0.0, 0.0), "difference, gated": (0.0, 0.0, 0.5), "trust": (0.5, 0.0, 0.0),
    "both": (0.5, 0.0, 0.5), "share": (0.0, 0.5, 0.0), "old adapted": (0.0, 1.0, 0.0),
}  # fmt: skip
"""Name -> trust, share and gate."""
OPTIONS = ReadingOptions(memory=False, quiet=0, top=10**9, extra=0)
"""As many candidate tokens as there are."""


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the likelihood and the share of likeliest tokens of every target."""
    reading, labels = read_items(opened(args), args, OPTIONS)

    def told(one: Reading, trust: float, share: float, gate: float) -> dict[str, float]:
        target = one.teacher(replace(OPTIONS, trust=trust, share=share), gate=gate, seed=0).target
        nll, hit = -target.gather(1, labels[:, None]).mean(), (target.argmax(-1) == labels).float().mean()
        return {"nll": round(float(nll), 4), "likeliest": round(float(hit), 4)}

    rows = {"new backbone": told(replace(reading, adapted=reading.plain), 0.0, 0.0, 0.0)}
    rows |= {name: told(reading, *how) for name, how in CHOICES.items()}
    return {"items": len(reading.turns), "positions": len(labels), "targets": rows}


def main() -> None:
    """Read the arguments and measure."""
    parser = arguments(__doc__)
    parser.add_argument("--out", required=True, type=Path, help="JSON file")
    args = parser.parse_args()
    stage(args.out.parent, args.out.stem, lambda: measure(args))


if __name__ == "__main__":
    main()
