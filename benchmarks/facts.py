"""How the memory of facts is fitted: what it knows of development items, and what it does to other text.

    python benchmarks/facts.py --old OLD --new NEW --adapter FACTS --map MAP --task facts --data DIR \
        --elicited benchmarks/results/facts/stages/elicited.json --text DIR/winogrande_test.json \
        --out benchmarks/results/memory_of_facts --fit "" --fit trust=0 --fit ENOUGH=0.1

Both models are read once. A fit is one row, written as JSON when made: one memory in place, without the last layer's
part. Small letters are options of the reading, capitals constants of `peft_lorasuite.methods.behavior.fact_editing`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import load_task, stage
from reading_study import arguments, opened

from peft_lorasuite.linalg.lowrank import LowRank
from peft_lorasuite.methods.base import find, make_options
from peft_lorasuite.methods.behavior import fact_editing as memory
from peft_lorasuite.methods.behavior.probe import read
from peft_lorasuite.methods.behavior.states import down_of
from peft_lorasuite.methods.behavior.targets import Teacher
from peft_lorasuite.methods.transplant import TransplantOptions
from peft_lorasuite.models.activations import batches
from peft_lorasuite.progress import bars
from peft_lorasuite.text.examples import read_examples
from peft_lorasuite.training.scoring import score


class Study:
    """What both models make of the prompts, read once."""

    model: Any
    """The new backbone's model, plain."""

    def __init__(self, args: argparse.Namespace) -> None:
        job = opened(args)
        more = json.loads(args.elicited.read_text(encoding="utf-8"))["prompts"][: args.more] if args.elicited else []
        self.job = replace(job, prompts=[*job.prompts, *more])
        self.options = TransplantOptions(prompts=2000, length=args.length, memory=False)
        self.reading = read(self.job, self.options)
        self.task = load_task("facts", args.data, 1)
        self.texts = [one.instruction for one in read_examples(args.text)][: args.texts]

    def row(self, changed: dict[str, str]) -> dict[str, Any]:
        """Fit a memory with some settings changed, and score it."""
        named = {name: value for name, value in changed.items() if not name.isupper()}
        options = make_options(find("transplant"), vars(self.options) | named)

        def ask(places: Sequence[int]) -> Teacher:
            return self.reading.teacher(options, gate=0.0, seed=self.job.seed, places=places)

        with constants({name: changed[name] for name in changed if name.isupper()}):
            found = memory.memorise(
                self.model, self.reading.new, self.reading.new_head, self.reading.turns, self.reading.places, ask,
                seed=self.job.seed, progress=bars,
            )  # fmt: skip
        assert found is not None
        layer, update, told = found
        return {"settings": changed, "fit": told} | self.score(layer, update)

    def score(self, layer: int, update: LowRank | None) -> dict[str, Any]:
        """Accuracy on the development items, and the divergence of other text's predictions from the base's."""
        new, seen = self.reading.new, self.task.seen  # the development items have the same order as the test's
        down = down_of(self.model, new, layer)
        apart = 0.0, 0
        with memory.updated(down, update):
            found = score(self.model, new.tokenizer, self.task.dev, options=self.task.options, progress=bars)
        for _, inputs in batches(new, self.texts, range(len(self.texts))):
            base = self.told(inputs)
            with memory.updated(down, update):
                got = self.told(inputs)
            apart = apart[0] + float((base.exp() * (base - got)).sum()), apart[1] + len(base)
        return {
            "nll": round(found.nll, 4), "seen": sum(found.right[:seen]) / seen,
            "unseen": sum(found.right[seen:]) / (found.n - seen), "divergence_of_text": round(apart[0] / apart[1], 4),
        }  # fmt: skip

    @torch.inference_mode()
    def told(self, inputs: Any) -> torch.Tensor:
        """Log-probabilities at every token of some texts."""
        return self.model(**inputs, use_cache=False).logits[inputs["attention_mask"].bool()].float().log_softmax(-1)


@contextmanager
def constants(changed: dict[str, str]) -> Iterator[None]:
    """Give constants of the memory other values for a while."""
    before = {name: getattr(memory, name) for name in changed}
    for name, text in changed.items():
        setattr(memory, name, type(before[name])(text))
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(memory, name, value)


def main() -> None:
    """Read both models, then make every fit."""
    parser = arguments(__doc__)
    parser.add_argument("--length", type=int, default=24, help="longest response that is read, in tokens")
    parser.add_argument("--elicited", type=Path, help="JSON with further prompts, a stage of gap.py")
    parser.add_argument("--more", type=int, default=800, help="how many of these are used")
    parser.add_argument("--text", required=True, help="JSON with instructions that no method reads")
    parser.add_argument("--texts", type=int, default=60, help="how many of these are read")
    parser.add_argument("--fit", action="append", default=[], metavar="KEY=VALUE,...", help="settings of one row")
    parser.add_argument("--out", required=True, type=Path, help="folder for the rows' JSON")
    args = parser.parse_args()
    study = Study(args)
    with study.reading.new.running() as study.model:
        stage(args.out, "base", lambda: study.score(0, None))
        for text in args.fit:
            changed = dict(pair.split("=", 1) for pair in text.split(",") if pair)
            stage(args.out, text or "default", lambda changed=changed: study.row(changed))


if __name__ == "__main__":
    main()
