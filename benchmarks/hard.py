"""Adapters of tasks that cannot be guessed (benchmarks/hard_tasks.py), moved without labels.

    python benchmarks/hard.py --task tools --old OLD --new NEW --data DIR --work DIR --out DIR [--seeds 0,1,2]

A LoRA is trained on conversations, each backbone reads them through its own chat template. Besides the rows of
benchmarks/conversation_pair.py there are two that must fail: ``other-task``, the upgraded adapter of the next task, and
``random``, random factors with the norms of the update of ``transplant``. ``transplant+100-0.001`` is the result of
``transplant`` fine-tuned on 100 labeled conversations, with new LoRAs in the modules that it lacks, to compare with
``fresh-100-0.001``. DIR of ``--data`` holds the LLM-Adapters files. ``gap`` is the share of the likelihood that full
retraining at its best rate gains.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from common import names_of
from conversation_pair import ROWS, SPARE, ConversationPair, Messages, add_arguments, run_rows
from conversation_table import summarize, write_table
from hard_tasks import TASKS, HardTask, chains_of
from safetensors.torch import load_file, save_file

from peft_lorasuite import Backbone
from peft_lorasuite.io.output import atomic_folder
from peft_lorasuite.models.generation import Turn
from peft_lorasuite.progress import progress_bars
from peft_lorasuite.training.finetune import finetune

FIGURES = {"accuracy": "accuracy", "stops": "stops"}
NAMES = (*TASKS, "chains")
TUNED_ROW = re.compile(r"transplant\+(?P<count>\d+)-(?P<rate>[\d.]+)")


class HardPair(ConversationPair):
    """One task on one pair of backbones with one seed."""

    def __init__(self, args: argparse.Namespace, name: str, seed: int) -> None:
        super().__init__(args, seed)
        self.task: HardTask = TASKS[name] if name in TASKS else chains_of(args.data)
        self.name, self.folder, self.length = name, args.work / name, self.task.length
        known = self.task.make(args.train + args.prompts + SPARE, False, seed)
        self.train, self.unlabeled, self.spare = known[: args.train], known[args.train : -SPARE], known[-SPARE:]
        # test items are the same for all seeds, and never among those that are learned from
        learned = {str(one[:-1]) for one in known}
        drawn = self.task.make(3 * args.items, not args.dev, 20_000 if args.dev else 10_000)
        self.test = [one for one in drawn if str(one[:-1]) not in learned][: args.items]

    def train_lora(
        self, backbone: Backbone, config: peft.LoraConfig, items: Sequence[Messages], rate: float, folder: Path
    ) -> None:
        """Train on the last turns with `finetune`."""
        finetune(
            peft.get_peft_model(backbone.load(), config), [{"messages": one} for one in items], samples=None,
            epochs=self.args.epochs, batch_size=8, learning_rate=rate, warmup=0.05, seed=self.seed,
            tokenizer=backbone.tokenizer, output=folder, overwrite=True, progress=progress_bars,
        )  # fmt: skip

    def judge(self, answered: Sequence[Turn]) -> tuple[list[bool], dict[str, Any]]:
        """Apply the rule of the task."""
        return [self.task.right(turn.response, item) for turn, item in zip(answered, self.test, strict=True)], {}

    def measure(self, row: str) -> dict[str, Any]:
        """Measure a row; the two that must fail are made here."""
        if row == "other-task":
            return self.other_task()
        if found := TUNED_ROW.fullmatch(row):
            return self.tuned(row, int(found["count"]), float(found["rate"]))
        if row == "random":
            return self.score(self.new, self.random(self.folder / f"transplant-{self.seed}"))
        return super().measure(row)

    def tuned(self, row: str, count: int, rate: float) -> dict[str, Any]:
        """Fine-tune the result of ``transplant`` on a few labels."""
        folder, start = self.folder / f"{row}-{self.seed}", time.perf_counter()
        finetune(
            self.folder / f"transplant-{self.seed}", [{"messages": one} for one in self.train[:count]], samples=None,
            epochs=self.args.epochs, batch_size=8, learning_rate=rate, warmup=0.05, seed=self.seed, base=self.new,
            modules=names_of(self.new.arch, self.new.arch.parts), output=folder, overwrite=True,
            progress=progress_bars,
        )  # fmt: skip
        return {"upgrade_seconds": round(time.perf_counter() - start, 1), **self.score(self.new, folder)}

    def other_task(self) -> dict[str, Any]:
        """Upgrade the adapter of the next task with that task's prompts, and score it on this one."""
        other = HardPair(self.args, NAMES[(NAMES.index(self.name) + 1) % len(NAMES)], self.seed)
        folder = other.folder / f"transplant-{self.seed}"
        if not folder.is_dir():
            other.upgraded("transplant")
        return self.score(self.new, folder) | {"adapter": other.name}

    def random(self, source: Path) -> Path:
        """Write random factors whose products have the norms of those of an adapter."""
        made, generator = {}, torch.Generator().manual_seed(self.seed)
        tensors = load_file(source / "adapter_model.safetensors")
        for key, down in tensors.items():
            if "lora_A" in key:
                up_key = key.replace("lora_A", "lora_B")
                a, b = (torch.randn(one.shape, generator=generator) for one in (down, tensors[up_key]))
                norm = (tensors[up_key].float() @ down.float()).norm()
                made |= {key: a, up_key: b * (norm / (b @ a).norm())}
        with atomic_folder(self.folder / f"random-{self.seed}", overwrite=True) as part:
            save_file(made, part / "adapter_model.safetensors")
            (part / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
        return self.folder / f"random-{self.seed}"


def main() -> None:
    """Run the rows, or read those that are there, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--task", required=True, choices=NAMES)
    parser.add_argument("--rows", default=",".join((*ROWS, "other-task", "random")), help="comma-separated")
    parser.add_argument("--epochs", type=int, default=3, help="of trained adapters (default: 3)")
    parser.add_argument("--dev", action="store_true", help="score items in the wordings of training, to choose by")
    args = parser.parse_args()
    seeds, rows, out = [int(text) for text in args.seeds.split(",")], args.rows.split(","), args.out / args.task
    for seed in seeds:
        run_rows(HardPair(args, args.task, seed), out, rows)
    write_table(out, summarize(out, rows, seeds, FIGURES))


if __name__ == "__main__":
    main()
