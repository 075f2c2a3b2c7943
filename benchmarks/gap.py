"""How much of an adapter's gain arrives on the new backbone: every method, without training and with 100 samples.

    python benchmarks/gap.py --old OLD --new NEW --adapter ADAPTER --task arc --data DIR --out benchmarks/results/NAME

OLD, NEW and ADAPTER are folders or Hub ids; DIR holds the LLM-Adapters files. Every row is a stage of its own, written
as JSON when measured; run it again to go on, with --rows to choose. benchmarks/table.py makes table and chart.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import peft
import torch
from common import ATTENTION, RECIPES, Task, load_task, modules_of, names_of, stage, wilson

from peft_lorasuite import Backbone, UpgradeMap, upgrade
from peft_lorasuite.adapters.adapter import read
from peft_lorasuite.adapters.writing import RECORD, REPORT, write_adapter
from peft_lorasuite.evaluation.answers import score_number
from peft_lorasuite.io.output import whole_folder
from peft_lorasuite.io.source import Source
from peft_lorasuite.methods.behavior.elicitation import elicit
from peft_lorasuite.methods.behavior.positions import adapted
from peft_lorasuite.methods.transplant import SHORT
from peft_lorasuite.models.generation import answer
from peft_lorasuite.progress import bars
from peft_lorasuite.text.examples import Example, fill
from peft_lorasuite.training.finetune import finetune
from peft_lorasuite.training.scoring import score
from peft_lorasuite.upgrading.map_cache import map_for

METHODS = {
    "copy": ("copy", {}, None),
    "lorasuite": ("lorasuite", {}, None),
    "lorasuite-reference": ("lorasuite", {"normalize": "none"}, None),
    "cross-lora": ("cross-lora", {}, None),
    "transport": ("transport", {}, None),
    "transplant": ("transplant", {}, "task"),
    "transplant-built-in-prompts": ("transplant", {}, "built-in"),
    "transplant-elicited": ("transplant", {}, "elicited"),
    "transplant-short": ("transplant", SHORT, "task"),
    "distill": ("distill", {}, "task"),
    "distill-elicited": ("distill", {}, "elicited"),
}
"""Row -> method, options, prompts: the task's, built-in ones, or the task's with what the adapter itself knows."""
GENERATED = 128
"""Tokens of a generated answer at most."""
VANILLA = {
    "vanilla-paper": (1e-3, 0.0),
    "vanilla-3e-4": (3e-4, 0.1),
    "vanilla-1e-3": (1e-3, 0.1),
    "vanilla-3e-3": (3e-3, 0.1),
}
"""Row of a fresh LoRA -> learning rate, share of its steps in which that rate rises; the first is the paper's."""


class Run:
    """One pair, one adapter, one task."""

    def __init__(self, args: argparse.Namespace, task: Task) -> None:
        self.args, self.task = args, task
        self.old, self.new = (Backbone.open(name, dtype=args.dtype) for name in (args.old, args.new))
        self.out = Path(args.out)
        self.stages = Path(args.stages or self.out / "stages")

    def map(self) -> UpgradeMap:
        """The pair's map: the one that was named, or the one that is cached between runs."""
        return UpgradeMap.load(self.args.map) if self.args.map else map_for(self.old, self.new, progress=bars)

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
        folder = self.trained(name, base) if tuned or base not in METHODS else self.adapter(base)
        told: dict[str, Any] = {}
        for key, file in (("report", REPORT), ("training", RECORD)):
            if (folder / file).is_file():
                found = json.loads((folder / file).read_text(encoding="utf-8"))
                told[key] = found["method"] | found["facts"] if key == "report" else _counted(found)
        return self.score(peft.PeftModel.from_pretrained(self.new.load(), str(folder)), self.new) | told

    def trained(self, name: str, base: str) -> Path:
        """Train a row's adapter, or return the folder where that was done."""
        folder = self.stages / "adapters" / name
        if folder.is_dir():
            return folder
        start = time.perf_counter()
        model = self.retrained() if base == "full" else self.lightly_trained(base)
        model.finetune_record["seconds"] = round(time.perf_counter() - start, 1)
        with whole_folder(folder) as part:
            write_adapter(model, part)
        return folder

    def retrained(self) -> Any:
        """Train a fresh LoRA as the source adapter was trained: its modules, its samples."""
        recipe = RECIPES[self.args.task]
        return self.tune(
            self.fresh(recipe.parts), recipe.parts, self.task.train, learning_rate=self.args.full_rate, warmup=0.1,
            samples=self.args.full_samples or recipe.samples, epochs=recipe.epochs,
        )  # fmt: skip

    def lightly_trained(self, base: str) -> Any:
        """Train on 100 samples: a fresh LoRA, or what a method made."""
        rate, warmup = VANILLA.get(base, (self.args.lft_rate, self.args.lft_warmup))
        if base in METHODS:
            carried = str(self.adapter(base))
            model = peft.PeftModel.from_pretrained(self.new.load(), carried, is_trainable=True)
        else:
            model = self.fresh(ATTENTION)
        data = self.task.labelled or self.task.train
        return self.tune(model, ATTENTION, data, learning_rate=rate, warmup=warmup, samples=100, epochs=3)

    def adapter(self, name: str) -> Path:
        """Upgrade the adapter by a row's method, or return the folder where that was done."""
        folder = self.stages / "adapters" / name
        if not folder.is_dir():
            method, options, prompts = METHODS[name]
            start = time.perf_counter()
            carried = upgrade(
                self.args.adapter, self.map(), method=method, options=self.options(method, options), old=self.old,
                new=self.new, prompts=self.prompts(prompts), seed=self.args.seed, progress=bars,
            )  # fmt: skip
            carried.report.facts["upgrade_seconds"] = round(time.perf_counter() - start, 1)
            with whole_folder(folder) as part:
                carried.write(part)
        return folder

    def prompts(self, which: str | None) -> list[str] | None:
        """Return the prompts of a row; None where it takes none or the built-in ones."""
        if which not in ("task", "elicited"):
            return None
        more = stage(self.stages, "elicited", self.elicited)["prompts"] if which == "elicited" else []
        return [*self.task.prompts, *more]

    def elicited(self) -> dict[str, Any]:
        """Return what ``recombine=N`` adds to the prompts: a stage of its own, since several rows want it."""
        with adapted(self.old, read(Source(self.args.adapter, "adapter"), self.old.arch)) as model:
            found = elicit(
                model, self.old, self.task.prompts, count=self.args.elicited, length=self.args.length,
                seed=self.args.seed, progress=bars,
            )  # fmt: skip
        return {"prompts": found}

    def options(self, method: str, options: dict[str, Any]) -> dict[str, Any]:
        """Return the options: the row's, the response length that the task needs, and what --set says."""
        chosen = dict(pair.split("=", 1) for pair in self.args.set)
        reads = {"length": self.args.length, "prompts": 1000} if method in ("transplant", "distill") else {}
        return options | reads | chosen

    def fresh(self, parts: Iterable[str]) -> Any:
        """Return a fresh LoRA of the paper's rank: r = alpha = 32."""
        targets = modules_of(self.new.arch, parts)
        config = peft.LoraConfig(r=32, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM")
        return peft.get_peft_model(self.new.load(), config)

    def tune(self, model: Any, parts: Iterable[str], data: list[Example], **options: Any) -> Any:
        """Train on labelled samples of the task; what sits in few of these parts' modules gets new LoRA in the rest."""
        modules = names_of(self.new.arch, parts)
        return finetune(
            model, data, modules=modules, seed=self.args.seed, tokenizer=self.new.tokenizer,
            micro_batch_size=self.args.micro_batch_size, progress=bars, **options,
        )  # fmt: skip

    def score(self, model: Any, backbone: Backbone) -> dict[str, Any]:
        """Score on the test items, or with --dev on the development items."""
        items = self.task.dev if self.args.dev else self.task.test
        found = score(model.eval(), backbone.tokenizer, items, options=self.task.options, progress=bars)
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
        """Let the model write out answers to every n-th item, greedily, and take the last number of each."""
        chosen = items[:: max(len(items) // self.args.generate, 1)][: self.args.generate]
        turns = answer(model, backbone, [fill(one) for one in chosen], length=GENERATED, batch=50, progress=bars)
        told = [score_number({"answer": one.answer}, [turn.response]) for one, turn in zip(chosen, turns, strict=True)]
        right = [int(one["acc"]) for one in told]
        return {
            "generated_accuracy": round(sum(right) / len(right), 4),
            "generated_interval": wilson(sum(right), len(right)),
            "generated_right": "".join(map(str, right)),
            "generated_ended": round(sum(turn.ended for turn in turns) / len(turns), 4),
        }


def _counted(record: dict[str, Any]) -> dict[str, Any]:
    """Return the record of a training with the number of its new modules instead of their names."""
    return record | {"new_modules": len(record["new_modules"])}


def main() -> None:
    """Read the arguments and measure the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", required=True, help="old backbone: folder or Hub id")
    parser.add_argument("--new", required=True, help="new backbone")
    parser.add_argument("--adapter", required=True, help="adapter of the old backbone")
    parser.add_argument("--task", required=True, choices=("arc", "facts", "math"))
    parser.add_argument("--data", required=True, type=Path, help="folder with the LLM-Adapters files")
    parser.add_argument("--out", required=True, help="folder for the rows' JSON")
    parser.add_argument("--stages", help="folder that keeps upgraded adapters between runs; by default under --out")
    parser.add_argument("--rows", help="comma-separated; NAME+lft fine-tunes on 100 samples after NAME", default="base")
    parser.add_argument("--map", help="folder of the pair's upgrade map; by default it is built and cached")
    parser.add_argument("--limit", type=int, default=240, help="test items")
    parser.add_argument("--length", type=int, default=32, help="longest response, in tokens, that transplant reads")
    parser.add_argument("--elicited", type=int, default=800, help="prompts that the rows 'elicited' put together anew")
    parser.add_argument("--lft-rate", type=float, default=1e-3, help="learning rate of the light fine-tuning")
    parser.add_argument("--full-rate", type=float, default=3e-4, help="learning rate of full retraining")
    parser.add_argument("--full-samples", type=int, help="its samples: as many as the source adapter was trained on")
    parser.add_argument("--generate", type=int, default=0, help="items answered in full, judged by the last number")
    parser.add_argument("--lft-warmup", type=float, default=0.0, help="share of its steps in which that rate rises")
    parser.add_argument("--micro-batch-size", type=int, help="samples that training reads at once (default: all 16)")
    parser.add_argument("--dev", action="store_true", help="score on development items: for tuning, with another --out")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="option of the method")
    parser.add_argument("--dtype", default="auto", help="of the models: float32 is faster on some CPUs")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    run = Run(args, load_task(args.task, args.data, args.limit))
    for name in args.rows.split(","):
        run.row(name.strip())


if __name__ == "__main__":
    main()
