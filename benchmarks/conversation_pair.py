"""Shared by the benchmarks of adapters trained on conversations: two backbones, their rows and their scores.

Every model is asked through its own chat template. ``other text`` is the divergence from the new backbone on solutions
of MATH problems, read as conversations without a system prompt.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import peft
import torch
import trl_rows
from chat_demo import LLAMA2
from common import hide_loading_bars, modules_of, pairs_of, stage, wilson
from trl_rows import TRL_ROW

from peft_lorasuite import Backbone, upgrade
from peft_lorasuite.io.output import atomic_folder
from peft_lorasuite.models.generation import Turn, answer
from peft_lorasuite.progress import progress_bars
from peft_lorasuite.text.chat import Chat
from peft_lorasuite.text.examples import read_records
from peft_lorasuite.text.messages import read_conversation
from peft_lorasuite.training.encoding import batch, encode_examples
from peft_lorasuite.training.scoring import score
from peft_lorasuite.upgrading.map_cache import load_or_build_map

Messages = list[dict[str, str]]
UPGRADES: dict[str, tuple[str, str | None]] = {
    "transplant": ("transplant", None),
    "distill": ("distill", None),
    "transplant-built-in-prompts": ("transplant", "built-in"),
    "distill-built-in-prompts": ("distill", "built-in"),
    "transplant-self-prompts": ("transplant", "self"),
}
"""Row -> method, and name of the prompts; None for those of the task."""
TRAINED = tuple(f"{name}-{rate:g}" for name in ("full", "fresh-100") for rate in (3e-4, 1e-3, 3e-3))
"""Rows of a fresh LoRA on the new backbone by default: labeled conversations and learning rate."""
TRAINED_ROW = re.compile(r"full-(?P<all>[\d.]+)|fresh-(?P<count>\d+)-(?P<rate>[\d.]+)")
SEQUENCE_KD = tuple(f"sequence-kd-{rate:g}" for rate in (3e-4, 1e-3, 3e-3))
"""Rows of a LoRA trained on the old adapted model's answers to the unlabeled prompts, and learning rate."""
SPARE = 10
"""Conversations for the sample answers of a report."""
ROWS = ("new-base", "old-base", "old-adapted", *UPGRADES, *SEQUENCE_KD, *TRAINED)


def turns(question: str, answer: str) -> Messages:
    """Return a conversation of two turns."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def share(outcomes: Sequence[bool]) -> float:
    """Return the share of true outcomes."""
    return round(sum(outcomes) / len(outcomes), 4)


class ConversationPair:
    """One pair of backbones, and an adapter of the old one; a program sets its conversations and how they are judged.

    Attributes:
        train: Labeled conversations.
        unlabeled: Conversations of which only the prompts are read.
        spare: More of them, for the sample answers of the report alone.
        test: Conversations that are scored.
        folder: Folder of the adapters.
        length: Tokens of an answer at most.
    """

    train: list[Messages]
    unlabeled: list[Messages]
    spare: list[Messages]
    test: list[Messages]

    def __init__(self, args: argparse.Namespace, seed: int) -> None:
        self.args, self.seed, self.folder, self.length = args, seed, args.work, 64
        self.old, self.new = (Backbone.open(name, dtype=args.dtype) for name in (args.old, args.new))
        if args.old_template:
            self.old.tokenizer.chat_template = LLAMA2 if args.old_template == "llama2" else args.old_template
        solved = json.loads((args.data / "math_data.json").read_text(encoding="utf-8"))
        self.other = [turns(one["instruction"], one["output"]) for one in solved[-60:] if one["output"]]

    def fit(self, backbone: Backbone, items: Sequence[Messages], rate: float, folder: Path) -> Path:
        """Train a LoRA, unless the folder is there."""
        if folder.is_dir():
            return folder
        torch.manual_seed(self.seed)
        with atomic_folder(folder) as part:
            self.train_lora(backbone, self.config(backbone), items, rate, part)
            backbone.tokenizer.save_pretrained(part)
        return folder

    def config(self, backbone: Backbone) -> peft.LoraConfig:
        """Return the settings of a LoRA on all modules."""
        modules = modules_of(backbone.arch, backbone.arch.parts)
        return peft.LoraConfig(r=16, lora_alpha=32, target_modules=modules, task_type="CAUSAL_LM")

    def train_lora(
        self, backbone: Backbone, config: peft.LoraConfig, items: Sequence[Messages], rate: float, folder: Path
    ) -> None:
        """Train a LoRA and write it to an empty folder."""
        raise NotImplementedError

    def judge(self, answered: Sequence[Turn]) -> tuple[list[bool], dict[str, Any]]:
        """Return which test items are answered correctly, and other figures."""
        raise NotImplementedError

    @cached_property
    def adapter(self) -> Path:
        """The adapter of the old backbone, with the tokenizer beside it."""
        return self.fit(self.old, self.train, self.args.old_rate, self.folder / f"old-{self.seed}")

    def upgraded(self, row: str) -> dict[str, Any]:
        """Upgrade the adapter by a row's method, and score it."""
        method, named = UPGRADES[row]
        folder = self.folder / f"{row}-{self.seed}"
        prompts = named or [{"messages": one[:-1]} for one in (*self.unlabeled, *self.spare)]
        options = {**({} if named else {"prompts": len(self.unlabeled)}), **pairs_of(self.args.set)}
        facts = self.upgrade_to(folder, self.adapter, method, prompts, options)
        return self.score(self.new, folder) | facts

    def upgrade_to(self, folder: Path, adapter: Path, method: str, prompts: Any, options: Any) -> dict[str, Any]:
        """Upgrade an adapter, write it, and return the time of the method and its findings."""
        pair_map = load_or_build_map(self.old, self.new, progress=progress_bars)
        start = time.perf_counter()
        found = upgrade(
            adapter, pair_map, method=method, options=options, old=self.old, new=self.new, prompts=prompts,
            seed=self.seed, progress=progress_bars,
        )  # fmt: skip
        seconds = round(time.perf_counter() - start, 1)
        found.save(folder, overwrite=True)
        facts = {name: found.report.facts.get(name) for name in ("prediction", "format", "prompts")}
        return {"upgrade_seconds": seconds, **facts}

    def measure(self, row: str) -> dict[str, Any]:
        """Make the model of a row and score it."""
        if row in ("new-base", "old-base"):
            return self.score(self.new if row == "new-base" else self.old, None)
        if row == "old-adapted":
            return self.score(self.old, self.adapter)
        if row in UPGRADES:
            return self.upgraded(row)
        if row.startswith("sequence-kd-"):
            return self.sequence_kd(row, float(row.removeprefix("sequence-kd-")))
        if by_trl := TRL_ROW.fullmatch(row):
            start, folder = time.perf_counter(), self.folder / f"{row}-{self.seed}"
            trl_rows.train(self, by_trl["name"], float(by_trl["rate"]), folder)
            return {"upgrade_seconds": round(time.perf_counter() - start, 1), **self.score(self.new, folder)}
        found = TRAINED_ROW.fullmatch(row)
        if found is None:
            raise SystemExit(f"unknown row {row!r}; known: {', '.join(ROWS)}")
        count = int(found["count"]) if found["count"] else None
        start = time.perf_counter()
        folder = self.fit(
            self.new, self.train[:count], float(found["rate"] or found["all"]), self.folder / f"{row}-{self.seed}"
        )
        return {"upgrade_seconds": round(time.perf_counter() - start, 1), **self.score(self.new, folder)}

    def sequence_kd(self, row: str, rate: float) -> dict[str, Any]:
        """Train on the answers of the old adapted model as if they were labels."""
        start = time.perf_counter()
        folder = self.fit(self.new, self.answered(self.old_adapted()), rate, self.folder / f"{row}-{self.seed}")
        return {"upgrade_seconds": round(time.perf_counter() - start, 1), **self.score(self.new, folder)}

    def old_adapted(self) -> Any:
        """Return the old model with its adapter merged."""
        return peft.PeftModel.from_pretrained(self.old.load(), str(self.adapter)).merge_and_unload().eval()

    def answered(self, model: Any) -> list[Messages]:
        """Return the unlabeled conversations with the old adapted model's answers."""
        found = self.answers(model, self.old, self.unlabeled)
        return [
            [*one[:-1], {"role": "assistant", "content": turn.response.strip()}]
            for one, turn in zip(self.unlabeled, found, strict=True)
            if turn.response.strip()
        ]

    def score(self, backbone: Backbone, folder: Path | None) -> dict[str, Any]:
        """Score answers, likelihood and, on the new side, the divergence on other text."""
        model = backbone.load()
        if folder is not None:
            model = peft.PeftModel.from_pretrained(model, str(folder))
        model = model.eval()
        answered = self.answers(model, backbone, self.test)
        right, figures = self.judge(answered)
        records = read_records([{"messages": one} for one in self.test])
        measured = {
            "nll": round(score(model, backbone.tokenizer, records).nll, 4),
            "stops": share([turn.ended for turn in answered]),
            "accuracy": share(right), "interval": wilson(sum(right), len(right)),
            "right": "".join(str(int(one)) for one in right), "items": len(right),
            "answers": [turn.response for turn in answered[:3]], **figures,
        }  # fmt: skip
        if backbone is self.new and folder is not None:
            measured["other_text"] = self.divergence(model)
        return measured

    def answers(self, model: Any, backbone: Backbone, items: Sequence[Messages]) -> list[Turn]:
        """Return the model's answers to conversations without their last turn."""
        chat = Chat(backbone.name, backbone.tokenizer)
        asked = [read_conversation(one[:-1], "the item") for one in items]
        ends = chat.turn_ends(asked[0])
        stops = () if ends is None else (ends.end,)
        prompts = [chat.write(one) for one in asked]
        return answer(model, backbone, prompts, length=self.length, stops=stops, progress=progress_bars)

    @torch.inference_mode()
    def divergence(self, model: Any) -> float:
        """Return the mean KL divergence from the new backbone, in nats per token, on other conversations."""
        rows = encode_examples(self.new.tokenizer, read_records([{"messages": one} for one in self.other]), None)
        total, count = 0.0, 0
        for start in range(0, len(rows), 8):
            inputs = batch(rows[start : start + 8], padding=0)
            inside = inputs.pop("labels")[:, 1:] >= 0
            adapted = model(**inputs).logits[:, :-1][inside].float().log_softmax(-1)
            with model.disable_adapter():
                base = model(**inputs).logits[:, :-1][inside].float().log_softmax(-1)
            total += float((base.exp() * (base - adapted)).sum())
            count += int(inside.sum())
        return round(total / count, 4)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that the programs share."""
    parser.add_argument("--old", required=True, help="old backbone: folder or Hub id")
    parser.add_argument("--new", required=True, help="new backbone")
    parser.add_argument("--data", required=True, type=Path, help="folder with the LLM-Adapters files")
    parser.add_argument("--work", required=True, type=Path, help="folder for adapters")
    parser.add_argument("--out", required=True, type=Path, help="folder for the rows' JSON")
    parser.add_argument("--old-template", help="llama2, or a template, for the old tokenizer")
    parser.add_argument("--seeds", default="0", help="comma-separated (default: 0)")
    parser.add_argument("--train", type=int, default=300, help="labeled conversations (default: 300)")
    parser.add_argument("--prompts", type=int, default=192, help="unlabeled conversations (default: 192)")
    parser.add_argument("--items", type=int, default=150, help="test conversations (default: 150)")
    parser.add_argument("--old-rate", type=float, default=1e-3, help="learning rate of the old adapter")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="option of the method")
    parser.add_argument("--dtype", default="auto", help="of the models: float32 is faster on some CPUs")


def run_rows(pair: ConversationPair, out: Path, rows: Sequence[str]) -> None:
    """Measure the rows of a seed, or read those that are there."""
    hide_loading_bars()
    for row in rows:
        stage(out / f"seed-{pair.seed}", row, lambda row=row: pair.measure(row))
