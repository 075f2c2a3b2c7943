"""Many settings of `transplant` from one reading of both models, scored on development items.

    python benchmarks/fits.py --old OLD --new NEW --adapter ADAPTER --map MAP --task math --data DIR --length 128 \
        --out benchmarks/results/fits/NAME --fit rank=16,positions=2000 --fit rank=64,share=0

A fit is one row, written as JSON when made: the likelihood of the reference answers with its update in place, prompt
and answer cut apart, as generation cuts them.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from common import stage
from reading_study import arguments, opened, read_items

from peft_lorasuite.linalg.lowrank import LowRank
from peft_lorasuite.methods.base import find, make_options
from peft_lorasuite.methods.behavior.probe import Reading, read
from peft_lorasuite.methods.behavior.targets import chunks
from peft_lorasuite.methods.transplant import TransplantOptions, fit


class Study:
    """What both models make of the prompts, and the new one of the development items."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.job = opened(args)
        self.options = TransplantOptions(prompts=1000, length=args.length, memory=False)
        self.items, self.labels = read_items(self.job, args, self.options)
        if self.items.new.arch.site("down").post_norm is not None:
            raise SystemExit("the new family has a norm behind `down`: its last states alone do not score an update")
        self.reading = read(self.job, self.options)

    def row(self, changed: dict[str, str]) -> dict[str, Any]:
        """Fit with some options changed, and score the update."""
        options = make_options(find("transplant"), vars(self.options) | changed)
        start = time.process_time()
        draft = fit(self.job, self.reading, options)
        told = {
            "settings": changed,
            "fit": draft.facts["transplant"],
            "cpu_seconds": round(time.process_time() - start),
        }
        (update,) = draft.updates.values()
        return told | score(self.items, update, self.labels)


@torch.no_grad()
def score(items: Reading, update: LowRank | None, labels: torch.Tensor) -> dict[str, float]:
    """Mean NLL of the reference answers' tokens, that of their ends alone, and the share of likeliest tokens."""
    nll, hit = torch.empty(len(labels)), torch.empty(len(labels))
    for rows in chunks(len(labels)):
        x, h, _ = items.last.at(rows)
        states = h.float() if update is None else h.float() + items.new.arch.residual_scale * update.applied(x)
        told = items.new_head.logits(states).log_softmax(-1)
        nll[rows] = -told.gather(1, labels[rows, None])[:, 0]
        hit[rows] = (told.argmax(-1) == labels[rows]).float()
    ends = labels == items.new.tokenizer.eos_token_id
    found = {"nll": nll.mean(), "nll_of_ends": nll[ends].mean(), "likeliest": hit.mean()}
    return {name: round(float(value), 4) for name, value in found.items()}


def main() -> None:
    """Read both models, then make every fit."""
    parser = arguments(__doc__)
    parser.add_argument("--length", type=int, default=32, help="longest response that is read, in tokens")
    parser.add_argument("--fit", action="append", default=[], metavar="KEY=VALUE,...", help="options of one row")
    parser.add_argument("--out", required=True, type=Path, help="folder for the rows' JSON")
    args = parser.parse_args()
    study = Study(args)
    stage(args.out, "base", lambda: score(study.items, None, study.labels))
    for text in args.fit:
        changed = dict(pair.split("=", 1) for pair in text.split(",") if pair)
        stage(args.out, text or "default", lambda changed=changed: study.row(changed))


if __name__ == "__main__":
    main()
