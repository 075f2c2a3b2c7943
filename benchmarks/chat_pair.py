"""Two real backbones in chat form: an adapter trained by TRL on conversations with a system prompt, without labels.

    python benchmarks/chat_pair.py --old OLD --new NEW --data DIR --work DIR --out DIR [--old-template llama2]

DIR of ``--data`` holds the LLM-Adapters files. The adapter answers ARC-Easy questions as JSON with two fields, the
letter of the choice and the text behind it; the system prompt does not ask for JSON. It is trained by TRL's
`SFTTrainer` on prompts and completions through the old tokenizer's chat template, which ``--old-template llama2``
replaces first.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
from conversation_pair import (
    ROWS,
    SPARE,
    ConversationPair,
    Messages,
    add_arguments,
    run_rows,
    share,
    turns,
)
from conversation_table import summarize, write_table
from trl_rows import settings

from peft_lorasuite import Backbone
from peft_lorasuite.models.generation import Turn
from peft_lorasuite.text.examples import read_examples

SYSTEM = "You help the pupils of a school library with their science quiz."
CHOICE = re.compile(r"Answer(\d): (.*?)(?= Answer\d: |$)")
FIGURES = {"parses": "parses", "stops": "stops", "accuracy": "letter_accuracy"}


def conversation(instruction: str, answer: str) -> Messages:
    """Return an ARC item as messages: system prompt, question with lettered choices, and the answer as JSON."""
    question, _, rest = instruction.partition("\n\n")
    choices = CHOICE.findall(rest.partition("\n\n")[0])
    question = question.partition("to the question: ")[2]
    lines = [f"{'ABCDE'[int(number) - 1]}) {text.strip()}" for number, text in choices]
    number = int(answer.removeprefix("answer"))
    made = {"choice": "ABCDE"[number - 1], "because": dict(choices)[str(number)].strip()}
    return [{"role": "system", "content": SYSTEM}, *turns("\n".join([question, *lines]), json.dumps(made))]


class RealPair(ConversationPair):
    """ARC-Easy with answers as JSON, and an adapter trained by TRL."""

    def __init__(self, args: argparse.Namespace, seed: int) -> None:
        super().__init__(args, seed)
        read = [read_examples(args.data / f"ARC-Easy_{part}.json") for part in ("train", "test")]
        train, test = ([conversation(one.instruction, one.answer) for one in part] for part in read)
        last = args.train + args.prompts
        self.train, self.unlabeled, self.spare = train[: args.train], train[args.train : last], train[last:][:SPARE]
        self.test = train[-args.items :] if args.dev else test[: args.items]

    def train_lora(
        self, backbone: Backbone, config: peft.LoraConfig, items: Sequence[Messages], rate: float, folder: Path
    ) -> None:
        """Train with TRL."""
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        records = [{"prompt": one[:-1], "completion": one[-1:]} for one in items]
        trainer = SFTTrainer(
            backbone.load(), args=SFTConfig(**settings(self, rate), max_length=512),
            train_dataset=Dataset.from_list(records), peft_config=config, processing_class=backbone.tokenizer,
        )  # fmt: skip
        trainer.train()
        trainer.save_model(str(folder))

    def judge(self, answered: Sequence[Turn]) -> tuple[list[bool], dict[str, Any]]:
        """Compare the letters, which answers of another form, such as the base model's, can have too."""
        wanted = [json.loads(item[-1]["content"])["choice"] for item in self.test]
        found = [parse(turn.response) for turn in answered]
        right = [one is not None and one.get("choice") == letter for one, letter in zip(found, wanted, strict=True)]
        letters = [first_letter(turn.response) == letter for turn, letter in zip(answered, wanted, strict=True)]
        parses = share([one is not None for one in found])
        return letters, {"parses": parses, "accuracy": share(right), "letter_accuracy": share(letters)}


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


def main() -> None:
    """Run the rows, or read those that are there, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--rows", default=",".join(ROWS), help="comma-separated; all by default")
    parser.add_argument("--dev", action="store_true", help="score development items instead of the test items")
    args = parser.parse_args()
    seeds, rows = [int(text) for text in args.seeds.split(",")], args.rows.split(",")
    for seed in seeds:
        run_rows(RealPair(args, seed), args.out, rows)
    write_table(args.out, summarize(args.out, rows, seeds, FIGURES))


if __name__ == "__main__":
    main()
