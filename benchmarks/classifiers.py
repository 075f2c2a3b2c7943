"""How much of a classifier's gain in accuracy is recovered on the new backbone, without labels.

    python benchmarks/classifiers.py --task intents --old OLD --new NEW --out FOLDER
    python benchmarks/classifiers.py --task operations --data DIR --old OLD --new NEW --out FOLDER

``intents`` (20 classes) is made by benchmarks/intents.py, ``operations`` (4 classes) by benchmarks/operations.py from
the files of the LLM-Adapters collection in DIR. For every seed a LoRA with a head is trained on the old backbone (row
``old-adapted``). On the new one: ``probe``, a logistic regression on the states of the bare model; ``full-RATE``, a
LoRA with a head trained on the same labels at a learning rate; ``transplant``, ``distill`` (``distill-RATE`` at
another rate than the default) and ``lorasuite`` (by weights), which see unlabeled texts and no label. With ``--dev``,
for choosing settings, other texts are scored than the test texts; those of ``intents`` have phrasings of the training
texts, which are left out there. Every row of a seed is a stage with a process of its own, written as JSON when
measured; run it again to continue. ``table.md`` and ``summary.json`` have the means over the seeds, and the share of
the gain over the most frequent class of full retraining at its best rate, which is the best one on the test texts.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import intents
import numpy as np
import operations
import peft
import torch
from common import hide_loading_bars, modules_of, pairs_of, stage, wilson, write_json

from peft_lorasuite import Backbone, upgrade
from peft_lorasuite.adapters.writing import write_peft_model
from peft_lorasuite.io.output import atomic_folder
from peft_lorasuite.model import attach
from peft_lorasuite.models.classification import class_logits, encode_for, forward_rows, padding_of
from peft_lorasuite.models.prefix_cache import decoder
from peft_lorasuite.models.task import DECODER, Task
from peft_lorasuite.progress import progress_bars
from peft_lorasuite.text.texts import Text
from peft_lorasuite.training.finetune import finetune
from peft_lorasuite.upgrading.map_cache import load_or_build_map

METHODS = ("transplant", "distill", "lorasuite")
FULL, DISTILL = "full-", "distill-"
"""Start of the names of rows of full retraining and distillation; the learning rate follows."""
ROWS = ("old-adapted", "probe", "full-0.0001", "full-0.0003", "full-0.001", *METHODS)


@dataclass(frozen=True)
class Data:
    """A task: labeled texts, unlabeled texts and test texts.

    Attributes:
        train: Texts and labels.
        unlabeled: Texts.
        test: Texts and labels.
    """

    train: list[dict[str, str]]
    unlabeled: list[str]
    test: list[dict[str, str]]

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """All labels, sorted."""
        return tuple(sorted({one["label"] for one in self.train}))

    @property
    def task(self) -> Task:
        """The task of the classifiers."""
        return Task("SEQ_CLS", self.labels)

    @property
    def majority(self) -> float:
        """Accuracy of the most frequent class."""
        frequent = Counter(one["label"] for one in self.train).most_common(1)[0][0]
        return sum(one["label"] == frequent for one in self.test) / len(self.test)


def load_data(args: argparse.Namespace) -> Data:
    """Read or make the task's texts; unlabeled texts and labeled ones are different ones."""
    if args.task == "operations":
        counts = {"train": args.labels, "unlabeled": args.texts, "test": args.items}
        return Data(*operations.make(args.data, **counts, dev=args.dev))
    known = intents.make(args.labels + args.texts, 2 if args.dev else 0, 0)
    test = intents.make(args.items, 3 if args.dev else 1, 1)
    return Data(known[: args.labels], [one["text"] for one in known[args.labels :]], test)


class Run:
    """One task on one pair of backbones with one seed."""

    def __init__(self, args: argparse.Namespace, data: Data, seed: int) -> None:
        self.args, self.data, self.seed = args, data, seed
        self.old, self.new = (Backbone.open(name, dtype=args.dtype) for name in (args.old, args.new))
        self.out = args.out / f"seed{seed}"

    def row(self, name: str) -> dict[str, Any]:
        """Measure one row, or read it."""
        if is_method(name):  # its time is not that of the method
            load_or_build_map(self.old, self.new, progress=progress_bars)
        return stage(self.out, name, lambda: self.measure(name))

    def measure(self, name: str) -> dict[str, Any]:
        """Make the row's classifier, and score it on the test texts."""
        torch.manual_seed(self.seed)
        if name == "probe":
            return self.probe()
        if is_method(name):
            return self.transferred(name)
        backbone = self.old if name == "old-adapted" else self.new
        folder = self.trained(name, backbone)
        return self.score(peft.PeftModel.from_pretrained(backbone.load(task=self.data.task), str(folder)), backbone)

    def trained(self, name: str, backbone: Backbone) -> Path:
        """Train a LoRA and a head on all labels, or return the folder of the trained adapter."""
        folder = self.out / "adapters" / name
        if folder.is_dir():
            return folder
        config = peft.LoraConfig(
            r=self.args.rank, lora_alpha=2 * self.args.rank, task_type="SEQ_CLS",
            target_modules=modules_of(backbone.arch, backbone.arch.parts),
        )  # fmt: skip
        model = peft.get_peft_model(backbone.load(task=self.data.task), config)
        rate = float(name.removeprefix(FULL)) if name.startswith(FULL) else self.args.old_rate
        finetune(
            model, self.data.train, samples=None, epochs=self.args.epochs, learning_rate=rate, warmup=0.1,
            micro_batch_size=self.args.micro_batch_size, seed=self.seed, tokenizer=backbone.tokenizer,
            progress=progress_bars,
        )  # fmt: skip
        with atomic_folder(folder) as part:
            write_peft_model(model, part)
        return folder

    def transferred(self, row: str) -> dict[str, Any]:
        """Upgrade the old classifier by a method."""
        method, _, rate = row.partition("-")
        adapter = self.trained("old-adapted", self.old)
        upgrade_map = load_or_build_map(self.old, self.new, progress=progress_bars)
        texts = None if method == "lorasuite" else self.data.unlabeled
        upgraded = upgrade(
            adapter, upgrade_map, method=method, old=self.old, new=self.new, prompts=texts, labels=self.data.labels,
            options=self.options(rate) if method == "distill" else None,
            seed=self.seed, progress=progress_bars,
        )  # fmt: skip
        model = attach(self.new.load(task=self.data.task), upgraded)
        return self.score(model, self.new) | {"fit": upgraded.report.facts.get(method, {})}

    def options(self, rate: str) -> dict[str, Any]:
        """Return the options of a distillation."""
        given = pairs_of(self.args.set)
        return given | {"learning_rate": float(rate)} if rate else given

    def probe(self) -> dict[str, Any]:
        """Fit a logistic regression to the labels on the final states of the bare new model."""
        from sklearn.linear_model import LogisticRegressionCV
        from sklearn.preprocessing import StandardScaler

        with self.new.running(task=DECODER) as model:
            train, test = (self.states(model, part) for part in (self.data.train, self.data.test))
        scaler = StandardScaler().fit(train)
        labels = [one["label"] for one in self.data.train]
        found = LogisticRegressionCV(
            Cs=np.logspace(-5, 0, 6),
            cv=3,
            max_iter=300,
            l1_ratios=(0,),
            scoring="accuracy",
            use_legacy_attributes=False,
        )
        found.fit(scaler.transform(train), labels)
        return self.outcome(list(found.predict(scaler.transform(test))))

    def states(self, model: Any, part: list[dict[str, str]]) -> np.ndarray:
        """Return the final states at the last token of every text."""
        rows = encode_for(self.new, [Text(one["text"]) for one in part], per_token=False)
        states = torch.empty(len(rows), self.new.arch.hidden)
        for numbers, output in forward_rows(decoder(model), rows, padding_of(self.new), progress_bars):
            last = [rows[number].places[-1] for number in numbers]
            states[numbers] = output.last_hidden_state[list(range(len(numbers))), last].float().cpu()
        return states.numpy()

    def score(self, model: Any, backbone: Backbone) -> dict[str, Any]:
        """Return the accuracy on the test texts."""
        rows = encode_for(backbone, [Text(one["text"]) for one in self.data.test], per_token=False)
        logits = torch.cat(class_logits(model.eval(), rows, padding_of(backbone), progress_bars))
        return self.outcome([self.data.labels[number] for number in logits.argmax(dim=1).tolist()])

    def outcome(self, predicted: list[str]) -> dict[str, Any]:
        """Return accuracy, interval and the outcome of every test text."""
        right = [found == one["label"] for found, one in zip(predicted, self.data.test, strict=True)]
        return {
            "accuracy": round(sum(right) / len(right), 4), "interval": wilson(sum(right), len(right)),
            "items": len(right), "right": "".join(str(int(one)) for one in right),
        }  # fmt: skip


def is_method(name: str) -> bool:
    """Return whether a row upgrades the old classifier."""
    return name in METHODS or name.startswith(DISTILL)


def summarize(runs: list[dict[str, dict[str, Any]]], data: Data) -> dict[str, Any]:
    """Return the means over the seeds by row; the share of the gain is that of the mean accuracies."""
    means = {
        name: {key: statistics.mean(run[name][key] for run in runs) for key in ("accuracy", "seconds", "peak_gb")}
        for name in runs[0]
    }
    ceiling = max((row["accuracy"] for name, row in means.items() if name.startswith(FULL)), default=None)
    for row in means.values():
        gain = None if ceiling is None else ceiling - data.majority
        row["share"] = (row["accuracy"] - data.majority) / gain if gain and gain > 0 else None
    return {"majority": data.majority, "seeds": len(runs), "labels": len(data.labels), "train": len(data.train),
            "texts": len(data.unlabeled), "items": len(data.test), "rows": means}  # fmt: skip


def table(found: dict[str, Any], title: str) -> str:
    """Return the summary as a Markdown table."""
    lines = [
        f"{title}: {found['labels']} classes, {found['train']} labeled texts, {found['texts']} unlabeled texts, "
        f"{found['items']} test texts, {found['seeds']} seeds; most frequent class {found['majority']:.3f}.", "",
        "| row | accuracy | share of the gain of full retraining | seconds | peak GB |", "|---|---:|---:|---:|---:|",
    ]  # fmt: skip
    for name, row in found["rows"].items():
        share = "-" if row["share"] is None or name == "old-adapted" else f"{row['share']:.0%}"
        lines.append(f"| {name} | {row['accuracy']:.3f} | {share} | {row['seconds']:.0f} | {row['peak_gb']:.1f} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Read the arguments, measure the rows of every seed, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, choices=("intents", "operations"))
    parser.add_argument("--data", type=Path, help="folder with the LLM-Adapters files, for operations")
    parser.add_argument("--dev", action="store_true", help="score other texts, to choose settings by")
    parser.add_argument("--old", required=True, help="old backbone: folder or Hub id")
    parser.add_argument("--new", required=True, help="new backbone")
    parser.add_argument("--out", required=True, type=Path, help="folder for the rows' JSON")
    parser.add_argument("--rows", default=",".join(ROWS), help="comma-separated (default: all)")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated (default: 0,1,2)")
    parser.add_argument("--labels", type=int, default=1000, help="labeled texts (default: 1000)")
    parser.add_argument("--texts", type=int, default=1000, help="unlabeled texts (default: 1000)")
    parser.add_argument("--items", type=int, default=500, help="test texts (default: 500)")
    parser.add_argument("--rank", type=int, default=16, help="of trained adapters (default: 16)")
    parser.add_argument("--epochs", type=int, default=4, help="of trained adapters (default: 4)")
    parser.add_argument("--old-rate", type=float, default=1e-3, help="learning rate of the old adapter (default: 1e-3)")
    parser.add_argument("--micro-batch-size", type=int, help="texts that training reads at once (default: all 16)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="option of distill")
    parser.add_argument("--dtype", default="auto", help="of the models: float32 is faster on some CPUs")
    parser.add_argument("--one-process", action="store_true", help="faster, but peak GB is that of all rows so far")
    args = parser.parse_args(arguments)
    if args.task == "operations" and args.data is None:
        parser.error("operations needs --data")
    hide_loading_bars()
    data = load_data(args)
    names = [name.strip() for name in args.rows.split(",")]
    unknown = sorted(name for name in set(names) - set(ROWS) if not name.startswith((FULL, DISTILL)))
    if unknown:
        raise SystemExit(f"unknown row {unknown[0]!r}; known: {', '.join(ROWS)}")
    seeds = [int(seed) for seed in args.seeds.split(",")]
    if not args.one_process:
        for seed in seeds:
            for name in names:
                own = [*(arguments or sys.argv[1:]), "--rows", name, "--seeds", str(seed), "--one-process"]
                subprocess.run([sys.executable, __file__, *own], check=True)
    found = summarize([{name: Run(args, data, seed).row(name) for name in names} for seed in seeds], data)
    write_json(args.out / "summary.json", found)
    text = table(found, args.task)
    (args.out / "table.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
