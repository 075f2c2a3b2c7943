"""The LoRASuite paper's experiment for a pair: train on the old backbone, upgrade, fine-tune lightly, evaluate.

    python benchmarks/reproduce.py minicpm --suite math --out results/minicpm-math
    python benchmarks/reproduce.py qwen-coder --old DIR --new DIR --adapter DIR --data DIR --suite ARC-Easy --limit 8 \
        --out DIR

PAIR names the backbones on the Hub (benchmarks/reproduce_pairs.py); --old and --new replace them by folders or other
ids. Without --adapter a LoRA (r = alpha = 32 on q, k, v, o) is trained on 10,000 samples of --train, by default the
LLM-Adapters file of the suite. Every stage is cached as JSON in --out, and an interrupted experiment continues;
result.json has the measurements, table.md the table in the form of the paper's, with its published rows below. One
suite at a time: the paper trains an adapter for each. The ids and the addresses of the training files were never tried,
for want of a network.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from common import ATTENTION, modules_of, stage
from reproduce_pairs import PAIRS, TRAIN, Pair

from peft_lorasuite import Backbone, LoraSuiteError, UpgradeMap, evaluate, upgrade
from peft_lorasuite.evaluation.published import published_pairs, published_rows
from peft_lorasuite.evaluation.scores import Evaluation, compare
from peft_lorasuite.evaluation.tables import comparison_table, markdown_table
from peft_lorasuite.evaluation.tasks import select
from peft_lorasuite.progress import progress_bars
from peft_lorasuite.text.examples import Example, read_examples
from peft_lorasuite.training.finetune import finetune

LABELS = {
    "old": "{old}, no adapter",
    "old-lora": "{old}, LoRA ({train})",
    "new": "{new}, no adapter",
    "upgraded": "{new}, LoRASuite w/o LFT",
    "vanilla": "{new}, LoRA ({samples})",
    "upgraded-lft": "{new}, LoRASuite w LFT ({samples})",
    "retrained": "{new}, LoRA ({train})",
}
"""Row -> label, in the order of the paper's tables."""


class Experiment:
    """One pair and one suite; every stage is made once."""

    def __init__(self, args: argparse.Namespace, pair: Pair) -> None:
        self.args, self.pair = args, pair
        self.out, self.work = Path(args.out), Path(args.work or Path(args.out) / "work")
        self.old, self.new = Backbone.open(args.old or pair.old), Backbone.open(args.new or pair.new)
        self.suite = select(args.suite)[0].suite
        self.samples = args.samples or dict(pair.samples).get(self.suite, 100)

    def run(self, rows: list[str]) -> dict[str, Any]:
        """Measure the rows, write result.json and table.md."""
        self._same_settings()
        found = {row: stage(self.out, row, lambda row=row: self._evaluated(row)) for row in rows}
        evaluations = {self._label(row): Evaluation.from_dict(one["evaluation"]) for row, one in found.items()}
        stages = {
            path.stem: json.loads(path.read_text())
            for path in sorted(self.out.glob("made-*.json"), key=lambda path: path.stem)
        }
        result = {"settings": self._settings(), "whole": self._whole(), "stages": stages, "rows": found}
        _write(self.out / "result.json", json.dumps(result, indent=1))
        _write(self.out / "table.md", self._table(evaluations))
        return result

    def _table(self, evaluations: dict[str, Evaluation]) -> str:
        known = self.pair.title in published_pairs()
        beside = published_rows(self.pair.title, self.suite) if known else None
        text = [markdown_table(evaluations, published=beside)]
        base, best = (evaluations.get(self._label(row)) for row in ("new", "upgraded"))
        if base and best:
            text += [
                f"\n{self._label('upgraded')} against {self._label('new')}:\n\n",
                comparison_table(compare(best, base)),
            ]
        return "".join(text)

    def _label(self, row: str) -> str:
        old, new = self.pair.names
        train = "given" if self.args.adapter and row == "old-lora" else _thousands(self.args.train_samples)
        return LABELS[row].format(old=old, new=new, train=train, samples=_thousands(self.samples))

    def _evaluated(self, row: str) -> dict[str, Any]:
        """Put the row's adapter on its backbone and score it."""
        backbone = self.old if row.startswith("old") else self.new
        makers: dict[str, Callable[[], Path]] = {
            "old-lora": self.adapter, "upgraded": self.upgraded, "vanilla": self.vanilla,
            "upgraded-lft": self.tuned, "retrained": self.retrained,
        }  # fmt: skip
        folder = makers[row]() if row in makers else None
        model = self._load(backbone)
        if folder is not None:
            model = peft.PeftModel.from_pretrained(model, str(folder))
        scores = evaluate(
            model, tokenizer=backbone.tokenizer, suite=self.args.suite, data=self.args.data, limit=self.args.limit,
            max_new_tokens=self.args.max_new_tokens, batch_size=self.args.batch_size, seed=self.args.seed,
        )  # fmt: skip
        return {"average": scores.average, "interval": scores.interval, "evaluation": self._nameless(scores, row)}

    def _nameless(self, scores: Evaluation, row: str) -> dict[str, Any]:
        """Return an evaluation with the row's label in place of the path that the model was loaded from."""
        return {**scores.to_dict(), "model": self._label(row)}

    def adapter(self) -> Path:
        """Return the old backbone's adapter: the given one, or one trained on the paper's samples."""
        if self.args.adapter:
            return Path(self.args.adapter)
        return self._made("adapter", lambda folder: self._train(self.old, self.args.train_samples, folder))

    def vanilla(self) -> Path:
        """Train a fresh LoRA on the new backbone, on the samples of the light fine-tuning."""
        return self._made("vanilla", lambda folder: self._train(self.new, self.samples, folder))

    def retrained(self) -> Path:
        """Train a fresh LoRA on the new backbone, on all samples."""
        return self._made("retrained", lambda folder: self._train(self.new, self.args.train_samples, folder))

    def map(self) -> Path:
        """Return the pair's upgrade map."""
        if self.args.map:
            return Path(self.args.map)
        return self._made(
            "map",
            lambda folder: UpgradeMap.build(self.old, self.new, progress=progress_bars).save(folder, overwrite=True),
        )

    def upgraded(self) -> Path:
        """Upgrade the old adapter, by weights as in the paper or by --method."""
        source = self.adapter()

        def work(folder: Path) -> None:
            upgrade(
                str(source), str(self.map()), method=self.args.method, old=self.old, new=self.new, seed=self.args.seed,
                progress=progress_bars,
            ).save(folder, overwrite=True)  # fmt: skip

        return self._made("upgraded", work)

    def tuned(self) -> Path:
        """Fine-tune the upgraded adapter lightly."""
        start = self.upgraded()

        def tune(folder: Path) -> None:
            model = peft.PeftModel.from_pretrained(self._load(self.new), str(start), is_trainable=True)
            self._finetune(model, self.new, self.samples, folder, learning_rate=1e-3)

        return self._made("upgraded-lft", tune)

    def _made(self, name: str, make: Callable[[Path], Any]) -> Path:
        """Make a folder once; its JSON is written after it, so that an interrupted stage is made again."""
        folder = self.work / name

        def work() -> dict[str, Any]:
            make(folder)
            return {"size_mb": round(sum(file.stat().st_size for file in folder.iterdir()) / 1e6, 2)}

        if not folder.is_dir():
            (self.out / f"made-{name}.json").unlink(missing_ok=True)
        stage(self.out, f"made-{name}", work)
        return folder

    def _train(self, backbone: Backbone, count: int, folder: Path) -> None:
        targets = modules_of(backbone.arch, ATTENTION)
        config = peft.LoraConfig(
            r=self.args.rank, lora_alpha=self.args.rank, target_modules=targets, task_type="CAUSAL_LM"
        )
        torch.manual_seed(self.args.seed)
        fresh = peft.get_peft_model(self._load(backbone), config)
        self._finetune(fresh, backbone, count, folder, learning_rate=3e-4, warmup=0.1)

    def _finetune(self, model: Any, backbone: Backbone, count: int, folder: Path, **rates: float) -> None:
        finetune(
            model, self._examples(), samples=count, epochs=self.args.epochs, seed=self.args.seed, output=folder,
            tokenizer=backbone.tokenizer, overwrite=True, progress=progress_bars,
            micro_batch_size=self.args.micro_batch_size, **rates,
        )  # fmt: skip

    def _examples(self) -> list[Example]:
        source = self.args.train or TRAIN[self.suite]
        if "://" not in source:
            return read_examples(source)
        from datasets import load_dataset

        return read_examples(load_dataset("json", data_files=source, split="train"))

    def _load(self, backbone: Backbone) -> Any:
        return Backbone.open(backbone.name).load(
            dtype=self.args.dtype, device_map="auto" if torch.cuda.is_available() else None
        )

    def _settings(self) -> dict[str, Any]:
        names = (
            "pair", "suite", "limit", "train_samples", "epochs", "rank", "method", "dtype", "max_new_tokens", "seed"
        )  # fmt: skip
        given = {name: bool(getattr(self.args, name)) for name in ("old", "new", "adapter", "map", "train", "data")}
        return {name: getattr(self.args, name) for name in names} | {"samples": self.samples, "given": given}

    def _whole(self) -> bool:
        """Return whether this is the paper's experiment and not a small run of the program."""
        given = self.args.adapter, self.args.limit, self.args.max_new_tokens
        return not any(given) and (self.args.train_samples, self.args.epochs, self.args.rank) == (10_000, 3, 32)

    def _same_settings(self) -> None:
        """Refuse stages made with other settings: they must not be in one table."""
        path, now = self.out / "settings.json", self._settings()
        if path.is_file() and (before := json.loads(path.read_text())) != now:
            other = [name for name in now if before.get(name) != now[name]]
            raise LoraSuiteError(
                "the folder holds stages of other settings", where=self.out, got={name: now[name] for name in other},
                wanted={name: before.get(name) for name in other}, do="choose another --out",
            )  # fmt: skip
        _write(path, json.dumps(now, indent=1))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.rstrip("\n") + "\n", encoding="utf-8")


def _thousands(count: int) -> str:
    return f"{count // 1000}k" if count >= 1000 and count % 1000 == 0 else str(count)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("pair", metavar="PAIR", choices=PAIRS, help=", ".join(PAIRS))
    made.add_argument("--old", help="folder or id in place of the pair's old backbone")
    made.add_argument("--new", help="the same for the new backbone")
    made.add_argument("--adapter", help="adapter of the old backbone, instead of training one")
    made.add_argument("--map", help="the pair's upgrade map, instead of building it")
    made.add_argument("--suite", default="math", help="math, commonsense or benchmarks of one of them (default: math)")
    made.add_argument("--data", help="folder of the test files; by default the Hub's datasets")
    made.add_argument("--train", help="training samples: file or address (default: the LLM-Adapters file)")
    made.add_argument("--train-samples", type=int, default=10_000, help="default: 10000")
    made.add_argument("--samples", type=int, help="of the light fine-tuning (default: as in the paper's table)")
    made.add_argument("--epochs", type=int, default=3)
    made.add_argument("--rank", type=int, default=32, help="of trained adapters (default: 32)")
    made.add_argument("--method", default="lorasuite", help="of the upgrade (default: lorasuite)")
    made.add_argument("--rows", default=",".join(LABELS), help=f"default: all of {', '.join(LABELS)}")
    made.add_argument("--limit", type=int, help="items of each benchmark (default: all)")
    made.add_argument("--max-new-tokens", type=int, help="longest response (default: as in the paper)")
    made.add_argument("--batch-size", type=int, default=8)
    made.add_argument("--micro-batch-size", type=int, help="samples that training reads at once (default: all)")
    made.add_argument("--dtype", default="auto", help="of the loaded backbones (default: the checkpoint's)")
    made.add_argument("--seed", type=int, default=0, help="of every draw (default: 0)")
    made.add_argument("--out", help="folder of the results (default: benchmarks/results/reproduce/PAIR-SUITE)")
    made.add_argument("--work", help="folder of maps and adapters (default: OUT/work)")
    return made


def main(argv: list[str] | None = None) -> int:
    """Run the experiment."""
    program = parser()
    args = program.parse_args(argv)
    pair = PAIRS[args.pair]
    rows = [row.strip() for row in args.rows.split(",")]
    if unknown := [row for row in rows if row not in LABELS]:
        program.error(f"unknown rows {', '.join(unknown)}; known: {', '.join(LABELS)}")
    try:
        if len({b.suite for b in select(args.suite)}) > 1:
            program.error("--suite: one suite at a time, since each has an adapter of its own")
        args.out = args.out or f"benchmarks/results/reproduce/{args.pair}-{args.suite.replace(',', '-').lower()}"
        run = Experiment(args, pair)
        run.run(rows)
    except LoraSuiteError as error:
        print(f"reproduce.py: {error}")
        return 1
    print((run.out / "table.md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
