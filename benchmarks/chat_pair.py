"""Two real backbones in chat form: an adapter trained by TRL on conversations with a system prompt, without labels.

    python benchmarks/chat_pair.py --old OLD --new NEW --data DIR --work DIR --out DIR [--old-template llama2]

DIR of ``--data`` holds the LLM-Adapters files. The adapter answers ARC-Easy questions as JSON with two fields, the
letter of the choice and the text behind it; the system prompt does not ask for JSON. It is trained by TRL's
`SFTTrainer` on prompts and completions through the old tokenizer's chat template, which ``--old-template llama2``
replaces first. Every model answers test questions through its own template. ``other text`` is the divergence from the
new backbone on solutions of MATH problems, read as conversations without a system prompt.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import peft
import torch
from chat_demo import LLAMA2
from common import RESULTS, hide_loading_bars, modules_of, paired, pairs_of, stage, wilson

from peft_lorasuite import Backbone, upgrade
from peft_lorasuite.io.output import atomic_folder
from peft_lorasuite.models.generation import answer
from peft_lorasuite.progress import progress_bars
from peft_lorasuite.text.chat import Chat
from peft_lorasuite.text.conversations import read_conversation
from peft_lorasuite.text.examples import read_examples, read_records
from peft_lorasuite.training.encoding import batch, encode_examples
from peft_lorasuite.training.scoring import score
from peft_lorasuite.upgrading.map_cache import load_or_build_map

SYSTEM = "You help the pupils of a school library with their science quiz."
LENGTH = 64
"""Tokens of an answer at most."""
UPGRADES: dict[str, tuple[str, str | None]] = {
    "transplant": ("transplant", None),
    "distill": ("distill", None),
    "transplant-built-in-prompts": ("transplant", "built-in"),
    "distill-built-in-prompts": ("distill", "built-in"),
    "transplant-self-prompts": ("transplant", "self"),
}
"""Row -> method, and name of the prompts; None for those of the task."""
TRAINED = {
    f"{name}-{rate:g}": (count, rate)
    for name, count in (("full", None), ("fresh-100", 100))
    for rate in (3e-4, 1e-3, 3e-3)
}
"""Row of a fresh LoRA on the new backbone -> labeled conversations (None for all) and learning rate."""
ROWS = ("new-base", "old-base", "old-adapted", *UPGRADES, *TRAINED)
CHOICE = re.compile(r"Answer(\d): (.*?)(?= Answer\d: |$)")


def turns(question: str, answer: str) -> list[dict[str, str]]:
    """Return a conversation of two turns."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def conversation(instruction: str, answer: str) -> list[dict[str, str]]:
    """Return an ARC item as messages: system prompt, question with lettered choices, and the answer as JSON."""
    question, _, rest = instruction.partition("\n\n")
    choices = CHOICE.findall(rest.partition("\n\n")[0])
    question = question.partition("to the question: ")[2]
    lines = [f"{'ABCDE'[int(number) - 1]}) {text.strip()}" for number, text in choices]
    number = int(answer.removeprefix("answer"))
    made = {"choice": "ABCDE"[number - 1], "because": dict(choices)[str(number)].strip()}
    return [{"role": "system", "content": SYSTEM}, *turns("\n".join([question, *lines]), json.dumps(made))]


class RealPair:
    """One pair of backbones, and an adapter of the old one."""

    def __init__(self, args: argparse.Namespace, seed: int) -> None:
        self.args, self.seed = args, seed
        self.old, self.new = (Backbone.open(name, dtype=args.dtype) for name in (args.old, args.new))
        if args.old_template:
            self.old.tokenizer.chat_template = LLAMA2 if args.old_template == "llama2" else args.old_template
        read = [read_examples(args.data / f"ARC-Easy_{part}.json") for part in ("train", "test")]
        train, test = ([conversation(one.instruction, one.answer) for one in part] for part in read)
        self.train, self.unlabeled = train[: args.train], train[args.train : args.train + args.prompts]
        self.test = train[-args.items :] if args.dev else test[: args.items]
        self.other = json.loads((args.data / "math_data.json").read_text(encoding="utf-8"))
        self.other = [turns(one["instruction"], one["output"]) for one in self.other[-60:] if one["output"]]

    def fit(self, backbone: Backbone, items: Sequence[list[dict[str, str]]], rate: float, folder: Path) -> Path:
        """Train a LoRA with TRL, unless the folder is there."""
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        if folder.is_dir():
            return folder
        torch.manual_seed(self.seed)
        config = peft.LoraConfig(
            r=16, lora_alpha=32, target_modules=modules_of(backbone.arch, backbone.arch.parts), task_type="CAUSAL_LM"
        )
        settings = SFTConfig(
            output_dir=str(folder.parent / "trainer"), num_train_epochs=3, per_device_train_batch_size=8,
            learning_rate=rate, warmup_steps=5, lr_scheduler_type="linear", seed=self.seed, report_to=[],
            save_strategy="no", logging_steps=20, bf16=False, gradient_checkpointing=False, max_length=512,
        )  # fmt: skip
        records = [{"prompt": one[:-1], "completion": one[-1:]} for one in items]
        trainer = SFTTrainer(
            backbone.load(), args=settings, train_dataset=Dataset.from_list(records), peft_config=config,
            processing_class=backbone.tokenizer,
        )  # fmt: skip
        trainer.train()
        with atomic_folder(folder) as part:
            trainer.save_model(str(part))
            backbone.tokenizer.save_pretrained(part)
        return folder

    @cached_property
    def adapter(self) -> Path:
        """The adapter of the old backbone, with the tokenizer beside it."""
        return self.fit(self.old, self.train, self.args.old_rate, self.args.work / f"old-{self.seed}")

    def upgraded(self, row: str) -> dict[str, Any]:
        """Upgrade the adapter by a row's method, and score it."""
        method, named = UPGRADES[row]
        pair_map = load_or_build_map(self.old, self.new, progress=progress_bars)
        folder, start = self.args.work / f"{row}-{self.seed}", time.perf_counter()
        prompts = named or [{"messages": one[:-1]} for one in self.unlabeled]
        options = {**({} if named else {"prompts": len(self.unlabeled)}), **pairs_of(self.args.set)}
        found = upgrade(
            self.adapter, pair_map, method=method, options=options, old=self.old, new=self.new, prompts=prompts,
            seed=self.seed, progress=progress_bars,
        )  # fmt: skip
        seconds = round(time.perf_counter() - start, 1)
        found.save(folder, overwrite=True)
        facts = {name: found.report.facts.get(name) for name in ("prediction", "format", "prompts")}
        return self.score(self.new, folder) | {"upgrade_seconds": seconds, **facts}

    def measure(self, row: str) -> dict[str, Any]:
        """Make the model of a row and score it."""
        if row in ("new-base", "old-base"):
            return self.score(self.new if row == "new-base" else self.old, None)
        if row == "old-adapted":
            return self.score(self.old, self.adapter)
        if row in UPGRADES:
            return self.upgraded(row)
        if row not in TRAINED:
            raise SystemExit(f"unknown row {row!r}; known: {', '.join(ROWS)}")
        count, rate = TRAINED[row]
        folder = self.fit(self.new, self.train[:count], rate, self.args.work / f"{row}-{self.seed}")
        return self.score(self.new, folder)

    def score(self, backbone: Backbone, folder: Path | None) -> dict[str, Any]:
        """Score answers, likelihood and, on the new side, the divergence on other text."""
        model = backbone.load()
        if folder is not None:
            model = peft.PeftModel.from_pretrained(model, str(folder))
        model = model.eval()
        chat = Chat(backbone.name, backbone.tokenizer)
        asked = [read_conversation(one[:-1], "the item") for one in self.test]
        ends = chat.turn_ends(asked[0])
        stops = () if ends is None else (ends.end,)
        answered = answer(
            model, backbone, [chat.write(one) for one in asked], length=LENGTH, stops=stops, progress=progress_bars
        )
        found = [parse(turn.response) for turn in answered]
        right = [
            one is not None and one.get("choice") == json.loads(item[-1]["content"])["choice"]
            for one, item in zip(found, self.test, strict=True)
        ]
        letters = [
            first_letter(turn.response) == json.loads(item[-1]["content"])["choice"]
            for turn, item in zip(answered, self.test, strict=True)
        ]
        records = read_records([{"messages": one} for one in self.test])
        measured = {
            "nll": round(score(model, backbone.tokenizer, records).nll, 4),
            "parses": share([one is not None for one in found]), "stops": share([turn.ended for turn in answered]),
            "accuracy": share(right), "interval": wilson(sum(right), len(right)),
            "letter_accuracy": share(letters),  # also of answers in another form, such as the base model's
            "right": "".join(str(int(one)) for one in letters), "items": len(right),
            "answers": [turn.response for turn in answered[:3]],
        }  # fmt: skip
        if backbone is self.new and folder is not None:
            measured["other_text"] = self.divergence(model)
        return measured

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


def share(outcomes: Sequence[bool]) -> float:
    """Return the share of true outcomes."""
    return round(sum(outcomes) / len(outcomes), 4)


def parse(text: str) -> dict[str, Any] | None:
    """Return an answer with the two fields, None for any other."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) and set(found) == {"choice", "because"} else None


def first_letter(text: str) -> str | None:
    """Return the first choice that an answer of any form names."""
    found = re.search(r"(?<![A-Za-z])([A-E])(?![A-Za-z'])", text)
    return found[1] if found else None


def summarize(out: Path, rows: Sequence[str], seeds: Sequence[int]) -> str:
    """Return a Markdown table: means over the seeds, and shares of the gap to full retraining at its best rate."""
    read = {row: [stage(out / f"seed-{seed}", row, dict) for seed in seeds] for row in rows}
    nll = {row: statistics.mean(one["nll"] for one in found) for row, found in read.items()}
    base, full = nll.get("new-base"), min((nll[row] for row in rows if row.startswith("full-")), default=None)
    lines = ["| row | NLL | gap | parses | stops | accuracy | against the base | other text | seconds |",
             "|---|---:|---:|---:|---:|---:|---:|---:|---:|"]  # fmt: skip
    for row, found in read.items():
        new = base is not None and not row.startswith("old-")
        gap = f"{(base - nll[row]) / (base - full):.0%}" if new and full is not None else "-"
        against = against_base(found, read["new-base"]) if new else "-"
        parses, stops, right, other, seconds = (
            statistics.mean(one.get(key, 0.0) for one in found)
            for key in ("parses", "stops", "letter_accuracy", "other_text", "upgrade_seconds")
        )
        lines.append(
            f"| {row} | {nll[row]:.3f} | {gap} | {parses:.3f} | {stops:.3f} | {right:.3f} | {against} | {other:.3f} "
            f"| {seconds:.0f} |"
        )
    return "\n".join(lines)


def against_base(found: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]]) -> str:
    """Return the paired difference of accuracies over all seeds, with its 95 % interval."""
    left, right = (map(int, "".join(one["right"] for one in side)) for side in (found, base))
    return "{:+.3f} ({:+.3f} to {:+.3f})".format(*paired(left, right))


def main() -> None:
    """Run the rows, or read those that are there, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", required=True, help="old backbone: folder or Hub id")
    parser.add_argument("--new", required=True, help="new backbone")
    parser.add_argument("--data", required=True, type=Path, help="folder with the LLM-Adapters files")
    parser.add_argument("--work", required=True, type=Path, help="folder for adapters")
    parser.add_argument("--out", type=Path, default=RESULTS / "chat_pair", help="folder for the rows' JSON")
    parser.add_argument("--old-template", help="llama2, or a template, for the old tokenizer")
    parser.add_argument("--rows", default=",".join(ROWS), help="comma-separated; all by default")
    parser.add_argument("--seeds", default="0", help="comma-separated (default: 0)")
    parser.add_argument("--train", type=int, default=300, help="labeled conversations (default: 300)")
    parser.add_argument("--prompts", type=int, default=192, help="unlabeled conversations (default: 192)")
    parser.add_argument("--items", type=int, default=150, help="test conversations (default: 150)")
    parser.add_argument("--old-rate", type=float, default=1e-3, help="learning rate of the old adapter")
    parser.add_argument("--dev", action="store_true", help="score development items instead of the test items")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="option of the method")
    parser.add_argument("--dtype", default="auto", help="of the models: float32 is faster on some CPUs")
    args = parser.parse_args()
    hide_loading_bars()
    seeds, rows = [int(text) for text in args.seeds.split(",")], args.rows.split(",")
    for seed in seeds:
        pair = RealPair(args, seed)
        for row in rows:
            stage(args.out / f"seed-{seed}", row, lambda pair=pair, row=row: pair.measure(row))
    text = summarize(args.out, rows, seeds)
    (args.out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
