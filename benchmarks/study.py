"""Studies of `transplant` on development items, from one run of both models.

    python benchmarks/study.py fits PAIR --length 128 --out FOLDER --fit rank=16,positions=2000 --fit teacher_weight=0
    python benchmarks/study.py targets PAIR --out FOLDER/NAME.json

PAIR is --old OLD --new NEW --adapter ADAPTER --map MAP --task arc --data DIR, as for gap.py.

``fits`` fits many settings to the same answers and scores every update: a row each, written as JSON when made. Options
that decide what is read off the models (prompts, length, anchors) stay the same for all of them. ``targets`` scores the
targets themselves, that is what a perfect fit would reach: the likelihood of the development items' reference answers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import RECIPES, load_task, pairs_of, stage

from peft_lorasuite import Backbone, UpgradeMap
from peft_lorasuite.adapters.reading import read_adapter
from peft_lorasuite.io.source import Source
from peft_lorasuite.linalg.lowrank import LowRank
from peft_lorasuite.methods.base import MethodInput
from peft_lorasuite.methods.behavior.options import TransplantOptions
from peft_lorasuite.methods.behavior.positions import tokenize
from peft_lorasuite.methods.behavior.probe import Probe, probe
from peft_lorasuite.methods.behavior.targets import chunks
from peft_lorasuite.methods.options import make_options
from peft_lorasuite.methods.registry import find
from peft_lorasuite.methods.transplant import fit_last_layer
from peft_lorasuite.models.generation import Turn
from peft_lorasuite.progress import progress_bars
from peft_lorasuite.text.examples import format_example

TARGETS: dict[str, dict[str, float]] = {
    "difference alone": {"teacher_weight": 0.0},
    "half": {"teacher_weight": 0.5},
    "old adapted": {"teacher_weight": 1.0},
}
"""Target -> its options."""
ALL_TOKENS = 10**9
"""As many candidate tokens as there are."""
BATCH = 256
"""Positions that are scored at once."""


def open_inputs(args: argparse.Namespace) -> MethodInput:
    """Return what a method is given, with the task's prompts."""
    old, new = (Backbone.open(name, dtype=args.dtype) for name in (args.old, args.new))
    adapter = read_adapter(Source(args.adapter, "adapter"), old.arch)
    prompts = load_task(args.task, args.data, 1).prompts
    return MethodInput(adapter, UpgradeMap.load(args.map), old, new, prompts, progress=progress_bars)


def probe_items(
    inputs: MethodInput, args: argparse.Namespace, options: TransplantOptions
) -> tuple[Probe, torch.Tensor]:
    """Probe both models on the development items' reference answers; also return the new token after each place."""
    _, new = inputs.backbones("transplant")
    turns = [
        Turn(format_example(one), one.output, True) for one in load_task(args.task, args.data, 1).dev[: args.items]
    ]
    probed = probe(inputs, options, turns)
    ended = [(*tokenize(new, turn).ids, new.tokenizer.eos_token_id) for turn in turns]
    return probed, torch.tensor([ended[turn][position + 1] for turn, _, position in probed.places])


def study_fits(args: argparse.Namespace) -> None:
    """Fit every setting and score it."""
    inputs, options = (
        open_inputs(args),
        TransplantOptions(prompts=args.prompts, length=args.length, edit_facts=False, samples=0),
    )
    items, labels = probe_items(inputs, args, options)
    if items.new.arch.site("down").post_norm is not None:
        raise SystemExit("the new family has a norm after `down`: the last layer's states alone do not score an update")
    probed = probe(inputs, options)

    def row(changed: Mapping[str, str]) -> dict[str, Any]:
        start = time.process_time()
        found = fit_last_layer(inputs, probed, probed.place, make_options(find("transplant"), vars(options) | changed))
        seconds = round(time.process_time() - start)
        (update,) = found.updates.values()
        scores = score(items, update, labels)
        return {"settings": changed, "fit": found.facts["transplant"], "cpu_seconds": seconds} | scores

    stage(args.out, "base", lambda: score(items, None, labels))
    for text in args.fit:
        changed = pairs_of(pair for pair in text.split(",") if pair)
        stage(args.out, text or "default", lambda changed=changed: row(changed))


@torch.no_grad()
def score(items: Probe, update: LowRank | None, labels: torch.Tensor) -> dict[str, float]:
    """Return the mean NLL of the reference answers' tokens, that of their ends alone, and the share predicted first."""
    nll, hit = torch.empty(len(labels)), torch.empty(len(labels))
    for rows in chunks(len(labels), BATCH):
        x, h, _ = items.last.at(rows)
        states = h.float() if update is None else h.float() + items.new.arch.residual_scale * update.apply(x)
        log_probs = items.new_head.logits(states).log_softmax(-1)
        nll[rows] = -log_probs.gather(1, labels[rows, None])[:, 0]
        hit[rows] = (log_probs.argmax(-1) == labels[rows]).float()
    ends, numbers = labels == items.new.tokenizer.eos_token_id, are_numbers(items, labels)
    found = {"nll": nll.mean(), "nll_of_ends": nll[ends].mean(), "likeliest": hit.mean(),
             "nll_of_numbers": nll[numbers].mean(), "numbers_likeliest": hit[numbers].mean()}  # fmt: skip
    return {name: round(float(value), 4) for name, value in found.items()}


def are_numbers(items: Probe, labels: torch.Tensor) -> torch.Tensor:
    """Return at which positions a number follows: the choice of an ARC answer, a result of a chain of thought."""
    tokens = items.new.tokenizer.convert_ids_to_tokens(labels.tolist())
    return torch.tensor([token.lstrip("ĠĊ▁").isdigit() for token in tokens])


def study_targets(args: argparse.Namespace) -> None:
    """Score every target."""
    options = TransplantOptions(edit_facts=False, anchor_tokens=0, top=ALL_TOKENS, extra=0)

    def measure() -> dict[str, Any]:
        probed, labels = probe_items(open_inputs(args), args, options)
        numbers = are_numbers(probed, labels)

        def row(one: Probe, changed: Mapping[str, float]) -> dict[str, float]:
            target = one.targets(replace(options, **changed), seed=0).log_probs
            nll, hit = -target.gather(1, labels[:, None])[:, 0], (target.argmax(-1) == labels).float()
            found = {"nll": nll.mean(), "likeliest": hit.mean(), "numbers_likeliest": hit[numbers].mean()}
            return {name: round(float(value), 4) for name, value in found.items()}

        unchanged = replace(probed, adapted_states=probed.plain_states)
        rows = {"new backbone": row(unchanged, TARGETS["difference alone"])}
        rows |= {name: row(probed, how) for name, how in TARGETS.items()}
        return {"items": len(probed.turns), "positions": len(labels), "targets": rows}

    stage(args.out.parent, args.out.stem, measure)


def main() -> None:
    """Read the arguments and run a study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=("fits", "targets"))
    parser.add_argument("--old", required=True, help="old backbone: folder or Hub id")
    parser.add_argument("--new", required=True, help="new backbone")
    parser.add_argument("--adapter", required=True, help="adapter of the old backbone")
    parser.add_argument("--map", required=True, help="folder of the pair's upgrade map")
    parser.add_argument("--task", required=True, choices=tuple(RECIPES))
    parser.add_argument("--data", required=True, type=Path, help="folder with the LLM-Adapters files")
    parser.add_argument("--items", type=int, default=40, help="development items")
    parser.add_argument("--prompts", type=int, default=1000, help="fits: prompts that are read at most (1000)")
    parser.add_argument("--dtype", default="auto", help="of the models: float32 is faster on some CPUs")
    parser.add_argument("--length", type=int, default=32, help="fits: longest response that is read, in tokens")
    parser.add_argument("--fit", action="append", default=[], metavar="KEY=VALUE,...", help="fits: options of one row")
    parser.add_argument("--out", required=True, type=Path, help="folder of the rows' JSON; targets: a JSON file")
    args = parser.parse_args()
    (study_fits if args.study == "fits" else study_targets)(args)


if __name__ == "__main__":
    main()
