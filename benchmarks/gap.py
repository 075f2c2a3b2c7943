"""How much of an adapter's gain is recovered on the new backbone: every method, without labels and with 100 samples.

    python benchmarks/gap.py demo [--rows base,full,transplant,...]
    python benchmarks/gap.py pair --old OLD --new NEW --adapter ADAPTER --task arc --data DIR --out FOLDER --rows base

``demo`` is the pair in the package; it needs a few minutes and nothing else. For ``pair`` OLD, NEW and ADAPTER are
folders or Hub ids, and DIR holds the LLM-Adapters files. Every row is a stage of its own, written as JSON when
measured; run it again to continue. benchmarks/tables.py makes table and chart.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gap_demo
import peft
import torch
from common import ATTENTION, RECIPES, Task, load_task, modules_of, names_of, pairs_of, stage, wilson

from peft_lorasuite import Backbone, UpgradeMap, upgrade
from peft_lorasuite.adapters.peft_model import load_with_adapter
from peft_lorasuite.adapters.reading import read_adapter
from peft_lorasuite.adapters.writing import RECORD, REPORT, write_peft_model
from peft_lorasuite.arch.registry import without_converters
from peft_lorasuite.evaluation.answers import score_number
from peft_lorasuite.io.output import atomic_folder
from peft_lorasuite.io.source import Source
from peft_lorasuite.methods.behavior.elicitation import synthesize_prompts
from peft_lorasuite.models.generation import answer
from peft_lorasuite.progress import progress_bars
from peft_lorasuite.text.examples import Example, format_example
from peft_lorasuite.training.finetune import finetune
from peft_lorasuite.training.scoring import score
from peft_lorasuite.upgrading.map_cache import load_or_build_map

METHODS = {
    "copy": ("copy", {}, None),
    "lorasuite": ("lorasuite", {}, None),
    "lorasuite-reference": ("lorasuite", {"normalize": "none"}, None),
    "cross-lora": ("cross-lora", {}, None),
    "transplant": ("transplant", {}, "task"),
    "transplant-built-in-prompts": ("transplant", {}, "built-in"),
    "transplant-elicited": ("transplant", {}, "elicited"),
    "transplant-without-fact-edit": ("transplant", {"edit_facts": False}, "task"),
    "distill": ("distill", {}, "task"),
    "distill-elicited": ("distill", {}, "elicited"),
}
"""Row -> method, options, prompts: the task's, the built-in ones, or the task's and synthetic ones (elicited)."""
GENERATED = 128
"""Tokens of a generated answer at most."""
VANILLA = {
    "vanilla-paper": (1e-3, 0.0),
    "vanilla-3e-4": (3e-4, 0.1),
    "vanilla-1e-3": (1e-3, 0.1),
    "vanilla-3e-3": (3e-3, 0.1),
}
"""Row of a fresh LoRA -> learning rate and warm-up; the first is the paper's."""


class PairRun:
    """One pair, one adapter, one task."""

    def __init__(self, args: argparse.Namespace, task: Task) -> None:
        self.args, self.task = args, task
        self.old, self.new = (Backbone.open(name, dtype=args.dtype) for name in (args.old, args.new))
        self.out = Path(args.out)
        self.stages = Path(args.stages or self.out / "stages")

    def row(self, name: str) -> dict[str, Any]:
        """Measure one row, or read it."""
        return stage(self.out, name, lambda: self.measure(name))

    def measure(self, name: str) -> dict[str, Any]:
        """Make the row's model and score it on the test items."""
        torch.manual_seed(self.args.seed)
        base, _, tuned = name.partition("+")
        if base == "old":
            return self.score(self.old.load(), self.old)
        if base == "old-adapted":
            return self.score(peft.PeftModel.from_pretrained(self.old.load(), self.args.adapter), self.old)
        if name == "base":
            return self.score(self.new.load(), self.new)
        if base not in (*METHODS, *VANILLA, "full"):
            raise SystemExit(f"unknown row {name!r}; known: base, {', '.join([*METHODS, *VANILLA])}, full, NAME+lft")
        folder = self.trained(name, base) if tuned or base not in METHODS else self.upgraded(base)
        found: dict[str, Any] = {}
        for key, file in (("report", REPORT), ("training", RECORD)):
            if (folder / file).is_file():
                record = json.loads((folder / file).read_text(encoding="utf-8"))
                found[key] = record["method"] | record["facts"] if key == "report" else _counted(record)
        return self.score(peft.PeftModel.from_pretrained(self.new.load(), str(folder)), self.new) | found

    def trained(self, name: str, base: str) -> Path:
        """Train a row's adapter, or return its folder."""
        folder = self.stages / "adapters" / name
        if folder.is_dir():
            return folder
        start = time.perf_counter()
        model = self.retrained() if base == "full" else self.lightly_trained(base)
        model.finetune_record["seconds"] = round(time.perf_counter() - start, 1)
        with atomic_folder(folder) as part:
            write_peft_model(model, part)
        return folder

    def retrained(self) -> Any:
        """Train a fresh LoRA as the source adapter was trained: its modules, its samples."""
        recipe = RECIPES[self.args.task]
        return self.tune(
            self.fresh(recipe.parts), recipe.parts, self.task.train, learning_rate=self.args.full_rate, warmup=0.1,
            samples=self.args.full_samples or recipe.samples, epochs=recipe.epochs,
        )  # fmt: skip

    def lightly_trained(self, base: str) -> Any:
        """Train on 100 samples: a fresh LoRA, or an upgraded adapter."""
        rate, warmup = VANILLA.get(base, (self.args.lft_rate, self.args.lft_warmup))
        if base in METHODS:
            start = str(self.upgraded(base))
            model = peft.PeftModel.from_pretrained(self.new.load(), start, is_trainable=True)
        else:
            model = self.fresh(ATTENTION)
        data = self.task.labeled or self.task.train
        return self.tune(model, ATTENTION, data, learning_rate=rate, warmup=warmup, samples=100, epochs=3)

    def upgraded(self, name: str) -> Path:
        """Upgrade the adapter by a row's method, or return its folder."""
        folder = self.stages / "adapters" / name
        if not folder.is_dir():
            method, options, prompts = METHODS[name]
            start = time.perf_counter()
            built = (
                UpgradeMap.load(self.args.map)
                if self.args.map
                else load_or_build_map(self.old, self.new, progress=progress_bars)
            )
            found = upgrade(
                self.args.adapter, built, method=method, options=self.options(method, options), old=self.old,
                new=self.new, prompts=self.prompts(prompts), seed=self.args.seed, progress=progress_bars,
            )  # fmt: skip
            found.report.facts["upgrade_seconds"] = round(time.perf_counter() - start, 1)
            with atomic_folder(folder) as part:
                found.write(part)
        return folder

    def prompts(self, which: str | None) -> list[str] | str | None:
        """Return the prompts of a row; None for none."""
        if which not in ("task", "elicited"):
            return which
        more = stage(self.stages, "elicited", self.elicited)["prompts"] if which == "elicited" else []
        return [*self.task.prompts, *more]

    def elicited(self) -> dict[str, Any]:
        """Return what ``synthetic_prompts=N`` adds to the prompts: a stage of its own, which several rows share."""
        with load_with_adapter(self.old, read_adapter(Source(self.args.adapter, "adapter"), self.old.arch)) as model:
            found = synthesize_prompts(
                model, self.old, self.task.prompts, count=self.args.elicited, length=self.args.length,
                seed=self.args.seed, progress=progress_bars,
            )  # fmt: skip
        return {"prompts": found}

    def options(self, method: str, options: dict[str, Any]) -> dict[str, Any]:
        """Return the row's options, the response length that the task needs, and those of --set."""
        reads = {"length": self.args.length, "prompts": 1000} if method in ("transplant", "distill") else {}
        return options | reads | pairs_of(self.args.set)

    def fresh(self, parts: Iterable[str]) -> Any:
        """Return a fresh LoRA of the paper's rank: r = alpha = 32."""
        targets = modules_of(self.new.arch, parts)
        config = peft.LoraConfig(r=32, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM")
        return peft.get_peft_model(self.new.load(), config)

    def tune(self, model: Any, parts: Iterable[str], data: list[Example], **options: Any) -> Any:
        """Train on labeled samples of the task; modules of these parts that have no LoRA get a new one."""
        modules = names_of(self.new.arch, parts)
        return finetune(
            model, data, modules=modules, seed=self.args.seed, tokenizer=self.new.tokenizer,
            micro_batch_size=self.args.micro_batch_size, progress=progress_bars, **options,
        )  # fmt: skip

    def score(self, model: Any, backbone: Backbone) -> dict[str, Any]:
        """Score on the test items, or with --dev on the development items."""
        items = self.task.dev if self.args.dev else self.task.test
        found = score(model.eval(), backbone.tokenizer, items, options=self.task.options, progress=progress_bars)
        right, seen = sum(found.right), self.task.seen
        apart = {"seen_accuracy": sum(found.right[:seen]) / seen} if seen else {}
        apart |= {"unseen_accuracy": sum(found.right[seen:]) / (found.n - seen)} if 0 < seen < found.n else {}
        apart |= self.generated(model, backbone, items) if self.args.generate else {}
        return apart | {
            "nll": round(found.nll, 4), "accuracy": round(found.accuracy, 4), "interval": wilson(right, found.n),
            "exact": round(found.exact, 4), "items": found.n,
            "right": "".join(str(int(value)) for value in found.right),
        }  # fmt: skip

    def generated(self, model: Any, backbone: Backbone, items: list[Example]) -> dict[str, Any]:
        """Let the model write answers to every n-th item, greedily, and judge each by its last number."""
        chosen = items[:: max(len(items) // self.args.generate, 1)][: self.args.generate]
        turns = answer(
            model, backbone, [format_example(one) for one in chosen], length=GENERATED, batch=50, progress=progress_bars
        )
        scores = [
            score_number({"answer": one.answer}, [turn.response]) for one, turn in zip(chosen, turns, strict=True)
        ]
        right = [int(one["acc"]) for one in scores]
        return {
            "generated_accuracy": round(sum(right) / len(right), 4),
            "generated_interval": wilson(sum(right), len(right)),
            "generated_right": "".join(map(str, right)),
            "generated_ended": round(sum(turn.ended for turn in turns) / len(turns), 4),
        }


def _counted(record: dict[str, Any]) -> dict[str, Any]:
    """Return the record of a training with the number of its new modules instead of their names."""
    return record | {"new_modules": len(record["new_modules"])}


def add_pair_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``gap.py pair``."""
    parser.add_argument("--old", required=True, help="old backbone: folder or Hub id")
    parser.add_argument("--new", required=True, help="new backbone")
    parser.add_argument("--adapter", required=True, help="adapter of the old backbone")
    parser.add_argument("--task", required=True, choices=tuple(RECIPES))
    parser.add_argument("--data", required=True, type=Path, help="folder with the LLM-Adapters files")
    parser.add_argument("--out", required=True, help="folder for the rows' JSON")
    parser.add_argument("--stages", help="folder that keeps upgraded adapters between runs; by default under --out")
    parser.add_argument("--rows", help="comma-separated; NAME+lft fine-tunes on 100 samples after NAME", default="base")
    parser.add_argument("--map", help="folder of the pair's upgrade map; by default it is built and cached")
    parser.add_argument("--limit", type=int, default=240, help="test items")
    parser.add_argument("--length", type=int, default=32, help="longest response, in tokens, that a method reads")
    parser.add_argument("--elicited", type=int, default=800, help="synthetic prompts of the rows 'elicited'")
    parser.add_argument("--lft-rate", type=float, default=1e-3, help="learning rate of the light fine-tuning")
    parser.add_argument("--lft-warmup", type=float, default=0.0, help="its warm-up, as a fraction of the steps")
    parser.add_argument("--full-rate", type=float, default=3e-4, help="learning rate of full retraining")
    parser.add_argument("--full-samples", type=int, help="its samples; by default those of the source adapter")
    parser.add_argument("--generate", type=int, default=0, help="items answered in full, judged by the last number")
    parser.add_argument("--micro-batch-size", type=int, help="samples that training reads at once (default: all 16)")
    parser.add_argument("--dev", action="store_true", help="score on development items: for tuning, with another --out")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="option of the method")
    parser.add_argument("--dtype", default="auto", help="of the models: float32 is faster on some CPUs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--without-converters", default="", help="model types to take as if they had no converter")


def main() -> None:
    """Read the arguments and measure the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    gap_demo.add_arguments(commands.add_parser("demo", help="the pair in the package"))
    add_pair_arguments(commands.add_parser("pair", help="any pair of backbones"))
    args = parser.parse_args()
    rows = [name.strip() for name in args.rows.split(",")]
    run: Any = gap_demo.DemoRun(args.out)
    if args.command == "pair":
        run = PairRun(args, load_task(args.task, args.data, args.limit))
    hidden = args.without_converters.split(",") if args.command == "pair" and args.without_converters else []
    with without_converters(*hidden):
        for name in rows:
            run.row(name)


if __name__ == "__main__":
    main()
