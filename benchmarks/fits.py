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
from common import load_task, stage

from peft_lorasuite import Backbone, UpgradeMap
from peft_lorasuite.adapter import read as read_adapter
from peft_lorasuite.answering import Turn
from peft_lorasuite.behaviour import tokens
from peft_lorasuite.lowrank import LowRank
from peft_lorasuite.methods.base import Job, find, make_options
from peft_lorasuite.methods.reading import Reading, read
from peft_lorasuite.methods.transplant import TransplantOptions, fit
from peft_lorasuite.progress import bars
from peft_lorasuite.prompts import fill
from peft_lorasuite.source import Source
from peft_lorasuite.teacher import chunks


class Study:
    """What both models make of the prompts, and the new one of the development items."""

    def __init__(self, args: argparse.Namespace) -> None:
        old, new = (Backbone.open(name, dtype=args.dtype) for name in (args.old, args.new))
        task = load_task(args.task, args.data, 1)
        adapter = read_adapter(Source(args.adapter, "adapter"), old.arch)
        self.job = Job(adapter, UpgradeMap.load(args.map), old, new, task.prompts, progress=bars)
        self.options = TransplantOptions(prompts=1000, length=args.length, memory=False)
        items = task.dev[: args.items]
        turns = [Turn(fill(one), one.output, True) for one in items]
        self.items, self.reading = read(self.job, self.options, turns), read(self.job, self.options)
        ended = [(*tokens(new, turn).ids, new.tokenizer.eos_token_id) for turn in turns]
        self.labels = torch.tensor([ended[turn][position + 1] for turn, _, position in self.items.places])
        self.scale = new.arch.residual_scale

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
        return told | score(self.items, update, self.labels, self.scale)


@torch.no_grad()
def score(items: Reading, update: LowRank | None, labels: torch.Tensor, scale: float) -> dict[str, float]:
    """Mean NLL of the reference answers' tokens, that of their ends alone, and the share of likeliest tokens."""
    nll, hit = torch.empty(len(labels)), torch.empty(len(labels))
    for rows in chunks(len(labels)):
        states = items.h[rows].float()
        states = states if update is None else states + scale * update.applied(items.x[rows])
        told = items.new_head.logits(states).log_softmax(-1)
        nll[rows] = -told.gather(1, labels[rows, None])[:, 0]
        hit[rows] = (told.argmax(-1) == labels[rows]).float()
    ends = labels == items.new.tokenizer.eos_token_id
    found = {"nll": nll.mean(), "nll_of_ends": nll[ends].mean(), "likeliest": hit.mean()}
    return {name: round(float(value), 4) for name, value in found.items()}


def main() -> None:
    """Read both models, then make every fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("old", "new", "adapter"):
        parser.add_argument(f"--{name}", required=True, help="folder or Hub id")
    parser.add_argument("--map", required=True, help="folder of the pair's upgrade map")
    parser.add_argument("--task", required=True, choices=("arc", "facts", "math"))
    parser.add_argument("--data", required=True, type=Path, help="folder with the LLM-Adapters files")
    parser.add_argument("--items", type=int, default=40, help="development items")
    parser.add_argument("--length", type=int, default=32, help="longest response that is read, in tokens")
    parser.add_argument("--fit", action="append", default=[], metavar="KEY=VALUE,...", help="options of one row")
    parser.add_argument("--dtype", default="auto", help="of the models")
    parser.add_argument("--out", required=True, type=Path, help="folder for the rows' JSON")
    args = parser.parse_args()
    study = Study(args)
    stage(args.out, "base", lambda: score(study.items, None, study.labels, study.scale))
    for text in args.fit:
        changed = dict(pair.split("=", 1) for pair in text.split(",") if pair)
        stage(args.out, text or "default", lambda changed=changed: study.row(changed))


if __name__ == "__main__":
    main()
