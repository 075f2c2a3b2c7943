"""The demo pair in chat form: an adapter trained on conversations, moved to a backbone with another chat template.

    python benchmarks/chat_demo.py [--seeds 0,1,2] [--rows ROW,...] [--out DIR]

The old tokenizer gets a template like that of Llama 2, the new one ChatML. The adapter is trained on ``messages`` with
a loss on the assistant turns, and saved with its tokenizer, as TRL does. Every model answers 300 test questions through
its own template; an answer is right if it is the expected one and stops there. About half an hour a seed on one core.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import peft
import torch
from common import RESULTS, hide_loading_bars, modules_of, pairs_of, stage, wilson
from demo_pair import DATA, FULL, RATES, timed

from peft_lorasuite import Backbone, UpgradeMap, upgrade
from peft_lorasuite.model import attach
from peft_lorasuite.models.generation import answer
from peft_lorasuite.text.chat import Chat
from peft_lorasuite.text.conversations import user_turn
from peft_lorasuite.text.examples import Example, read_examples, read_records
from peft_lorasuite.training.finetune import finetune
from peft_lorasuite.training.scoring import score

LLAMA2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ bos_token }}[INST] {{ message['content'] }} "
    "[/INST]{% else %} {{ message['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML with the end-of-sequence token as its end of turn: the vocabulary has no other."""
ITEMS = 300
LENGTH = 8
LABELED = 100
TRANSPLANT: dict[str, Any] = {"length": LENGTH, "rank": 64}
DISTILL: dict[str, Any] = {"length": LENGTH, "epochs": 10, "batch_size": 2, "learning_rate": 3e-3}
UPGRADES: dict[str, tuple[str, dict[str, Any], int, str]] = {
    "transplant-150": ("transplant", TRANSPLANT, 150, "messages"),
    "transplant-600": ("transplant", TRANSPLANT, 600, "messages"),
    "distill-150": ("distill", DISTILL, 150, "messages"),
    "distill-600": ("distill", DISTILL, 600, "messages"),
    "transplant-600-plain-text": ("transplant", TRANSPLANT, 600, "text"),
    "distill-600-plain-text": ("distill", DISTILL, 600, "text"),
    "distill-600-old-template-for-both": ("distill", DISTILL, 600, "old"),
    "distill-built-in-prompts": ("distill", {**DISTILL, "prompts": 600}, 0, "none"),
}
"""Row -> method, its options, number of unlabeled conversations, and how they are given."""
ROWS = ("new-base", "old-base", "old-adapted", *UPGRADES, "full-retraining", *(f"fresh-100-{rate:g}" for rate in RATES))


class ChatPair:
    """The demo pair with chat templates, and its adapter, trained on conversations.

    Args:
        folder: Where backbones and adapter are written.
        seed: Seed of all training.
        dev: Score on questions that are neither prompts nor test items, to choose settings; the adapter has seen them.
        options: Options of the method, in addition to those of a row.
    """

    def __init__(self, folder: Path, seed: int, *, dev: bool = False, options: dict[str, str] | None = None) -> None:
        self.folder, self.seed, self.options = folder, seed, options or {}
        for side, template in (("old", LLAMA2), ("new", CHATML)):
            if not (folder / side).is_dir():
                shutil.copytree(DATA / side, folder / side)
                tokenizer = Backbone.open(folder / side).tokenizer
                tokenizer.chat_template = template
                tokenizer.save_pretrained(folder / side)
        self.old, self.new = (Backbone.open(folder / side) for side in ("old", "new"))
        self.train, self.test = (read_examples(DATA / f"{name}.json") for name in ("train", "test"))
        self.test = self.train[-ITEMS:] if dev else self.test

    @cached_property
    def adapter(self) -> Path:
        """The adapter of the old backbone, with the tokenizer beside it."""
        folder = self.folder / f"adapter-{self.seed}"
        if not folder.is_dir():
            trained = self.fit(self.old, self.train, **FULL)
            trained.save_pretrained(folder)
            self.old.tokenizer.save_pretrained(folder)
        return folder

    @cached_property
    def map(self) -> UpgradeMap:
        """The pair's upgrade map."""
        return UpgradeMap.build(self.old, self.new, calibration=DATA / "calibration.txt")

    def fit(self, backbone: Backbone, items: Sequence[Example], **training: Any) -> Any:
        """Train a fresh LoRA on conversations."""
        targets = modules_of(backbone.arch, backbone.arch.parts)
        config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM")
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            fresh = peft.get_peft_model(backbone.load(dtype="float32"), config)
        return finetune(fresh, conversations(items), tokenizer=backbone.tokenizer, seed=self.seed, **training)

    def upgraded(self, row: str) -> Any:
        """Return the new backbone with the adapter of a row, and facts of its report."""
        method, options, count, form = UPGRADES[row]
        prompts: list[Any] | str = conversations(self.train[:count], labeled=False) if count else "built-in"
        if form == "text":
            prompts = [item.instruction for item in self.train[:count]]
        chat = {"new_template": "old"} if form == "old" else None
        options = {"prompts": count or 600, **options, **self.options}
        found = upgrade(
            self.adapter, self.map, method=method, options=options, old=self.old, new=self.new, prompts=prompts,
            chat=chat, seed=self.seed,
        )  # fmt: skip
        return attach(self.new.load(dtype="float32"), found)

    def score(self, model: Any, backbone: Backbone) -> dict[str, Any]:
        """Ask the test questions through the backbone's own template."""
        chat, items = Chat(backbone.name, backbone.tokenizer), self.test[:ITEMS]
        asked = [user_turn(item.instruction) for item in items]
        ends = chat.turn_ends(asked[0])
        stops = () if ends is None else (ends.end,)
        turns = answer(model.eval(), backbone, [chat.write(one) for one in asked], length=LENGTH + 4, stops=stops)
        right = [
            turn.ended and turn.response.split() == item.output.split() for turn, item in zip(turns, items, strict=True)
        ]
        ended = sum(turn.ended for turn in turns) / len(turns)
        nll = score(model, backbone.tokenizer, read_records(conversations(items))).nll
        return {
            "nll": round(nll, 4), "accuracy": round(sum(right) / len(right), 4),
            "interval": wilson(sum(right), len(right)), "ended": round(ended, 4), "items": len(right),
            "answers": [turn.response for turn in turns[:5]],
        }  # fmt: skip

    def measure(self, row: str) -> dict[str, Any]:
        """Make the model of a row and score it."""
        if row in ("old-base", "old-adapted"):
            plain = self.old.load(dtype="float32")
            model = plain if row == "old-base" else peft.PeftModel.from_pretrained(plain, self.adapter)
            return self.score(model, self.old)
        work: Callable[[], Any] = lambda: self.new.load(dtype="float32")  # noqa: E731
        if row in UPGRADES:
            _ = self.adapter, self.map  # made before the clock starts
            work = lambda: self.upgraded(row)  # noqa: E731
        elif row == "full-retraining":
            work = lambda: self.fit(self.new, self.train, **FULL)  # noqa: E731
        elif row.startswith("fresh-100-"):
            training = {"samples": LABELED, "learning_rate": float(row.rpartition("-100-")[2]), "warmup": 0.1}
            work = lambda: self.fit(self.new, self.train, **training)  # noqa: E731
        elif row != "new-base":
            raise SystemExit(f"unknown row {row!r}; known: {', '.join(ROWS)}")
        model, seconds, peak = timed(work)
        return self.score(model, self.new) | {"making_seconds": round(seconds, 1), "making_peak_mb": peak}


def conversations(items: Sequence[Example], *, labeled: bool = True) -> list[dict[str, Any]]:
    """Return items as records of messages."""
    return [
        {
            "messages": [
                {"role": "user", "content": item.instruction},
                *([{"role": "assistant", "content": item.output}] if labeled else []),
            ]
        }
        for item in items
    ]


def table(out: Path, rows: Sequence[str], seeds: Sequence[int]) -> str:
    """Return accuracies in Markdown, one line a row: the mean over the seeds and each seed."""
    lines = ["| row | NLL | accuracy | each seed | answers that end | seconds |", "|---|---:|---:|---|---:|---:|"]
    for row in rows:
        found = [stage(out / f"seed-{seed}", row, dict) for seed in seeds]
        right = [one["accuracy"] for one in found]
        nll = statistics.mean(one["nll"] for one in found)
        cells = f"{nll:.3f} | {statistics.mean(right):.1%} | {', '.join(f'{one:.1%}' for one in right)}"
        ended = statistics.mean(one["ended"] for one in found)
        seconds = statistics.mean(one.get("making_seconds", 0.0) for one in found)
        lines.append(f"| {row} | {cells} | {ended:.1%} | {seconds:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Run the rows, or read those that are there, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0", help="comma-separated (default: 0)")
    parser.add_argument("--rows", default=",".join(ROWS), help="comma-separated; all by default")
    parser.add_argument("--out", type=Path, default=RESULTS / "demo_chat", help="folder for the rows' JSON")
    parser.add_argument("--dev", action="store_true", help="score development questions instead of the test items")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="option of the method")
    parser.add_argument("--work", type=Path, required=True, help="folder for backbones and adapters")
    args = parser.parse_args()
    hide_loading_bars()
    seeds, rows = [int(text) for text in args.seeds.split(",")], args.rows.split(",")
    for seed in seeds:
        pair = ChatPair(args.work, seed, dev=args.dev, options=pairs_of(args.set))
        for row in rows:
            stage(args.out / f"seed-{seed}", row, lambda pair=pair, row=row: pair.measure(row))
    text = table(args.out, rows, seeds)
    (args.out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
