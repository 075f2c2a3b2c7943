"""Would more layers help transplant? Fits one after another, each to what the earlier ones left, on the demo pair.

    python benchmarks/layers.py [--out benchmarks/results/layers/demo.json]

Every plan is a row of layers, counted from the end: 1 is the last one, which `transplant` changes alone. Development
items are scored (training items about other animals); the targets are those of `transplant`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from common import machine
from demo_pair import METHODS, TEMPLATE, DemoPair
from torch import Tensor

from peft_lorasuite.adapters.adapter import read as read_adapter
from peft_lorasuite.io.source import Source
from peft_lorasuite.linalg.lowrank import LowRank, reduced_rank_ridge
from peft_lorasuite.methods.base import Job
from peft_lorasuite.methods.behavior.fact_editing import updated
from peft_lorasuite.methods.behavior.last_layer import wanted_shift
from peft_lorasuite.methods.behavior.positions import forward, tokens
from peft_lorasuite.methods.behavior.probe import read
from peft_lorasuite.methods.transplant import SHORT, TransplantOptions
from peft_lorasuite.text.examples import fill

PLANS = {"last": (1,), "last twice": (1, 1), "two": (2, 1), "two, twice": (2, 1, 2, 1), "three": (3, 2, 1)}


class Study:
    """The demo pair's models, read once, and the update of every layer so far."""

    def __init__(self) -> None:
        self.pair = DemoPair(dev=True)
        old, new, prompts = self.pair.old, self.pair.new, self.pair.train[: self.pair.prompts]
        adapter = read_adapter(Source(str(self.pair.adapter), "adapter"), old.arch)
        self.options = TransplantOptions(**METHODS["transplant"][1], memory=False)
        job = Job(adapter, self.pair.map, old, new, [fill(item, TEMPLATE) for item in prompts])
        self.reading, self.model = read(job, self.options), new.load(dtype="float32")
        self.rows = [tokens(new, turn) for turn in self.reading.turns]
        self.wanted = [(turn, position) for turn, _, position in self.reading.places]
        self.layers = list(self.model.get_submodule(new.arch.layer_path))
        self.path = new.arch.site("down").path

    def run(self, plan: tuple[int, ...], gate: float, ridge: float) -> dict[str, float]:
        """Fit a plan and score it."""
        teacher = self.reading.teacher(self.options, gate=gate, seed=0)
        updates: list[tuple[int, LowRank]] = []
        for back in plan:
            x, h, quiet = self.look(updates, back)
            shift = wanted_shift(self.reading.new_head, h, teacher, ridge=self.options.shift_ridge, steps=25)
            update, _ = reduced_rank_ridge(
                x, shift, quiet, weight=self.options.weight, ridge=ridge, rank=self.options.rank or 64
            )
            updates.append((back, update))
        _, h, _ = self.look(updates, 1)
        got = self.reading.new_head.on(teacher.ids).logits(h).log_softmax(-1)
        left = torch.nn.functional.kl_div(got, teacher.target, reduction="batchmean", log_target=True)
        with self.with_updates(updates):
            found = self.pair.score(self.model)
        return {"divergence_left": round(float(left), 3), "nll": found["nll"], "accuracy": found["accuracy"]}

    @contextmanager
    def with_updates(self, updates: list[tuple[int, LowRank]]) -> Iterator[None]:
        """Run the model with some layers' down projections updated."""
        with ExitStack() as stack:
            for back, update in updates:
                stack.enter_context(updated(self.layers[-back].get_submodule(self.path), update))
            yield

    def look(self, updates: list[tuple[int, LowRank]], back: int) -> tuple[Tensor, Tensor, Tensor]:
        """Input of a layer's down projection and output of the last layer where answers are predicted; quiet inputs."""
        seen: dict[str, Any] = {}
        x: dict[tuple[int, int], Tensor] = {}
        h: dict[tuple[int, int], Tensor] = {}
        down = self.layers[-back].get_submodule(self.path)
        hooks = [
            down.register_forward_hook(lambda module, args, output: seen.update(x=args[0])),
            self.layers[-1].register_forward_hook(lambda module, args, output: seen.update(h=output)),
        ]
        with self.with_updates(updates):
            for numbers, _, taken in forward(self.model, self.rows):
                for line, number in enumerate(numbers):
                    for position in range(taken, len(self.rows[number].ids)):
                        x[number, position] = seen["x"].reshape(len(numbers), -1, seen["x"].shape[-1])[
                            line, position - taken
                        ]
                        h[number, position] = seen["h"][line, position - taken]
        for hook in hooks:
            hook.remove()
        quiet = [(turn, place) for turn, row in enumerate(self.rows) for place in row.reading if (turn, place) in x]
        drawn = torch.randperm(len(quiet), generator=torch.Generator().manual_seed(0))[: self.options.quiet].tolist()
        places = self.wanted, self.wanted, [quiet[number] for number in drawn]
        first, second, third = (
            torch.stack([kept[at] for at in ats]) for kept, ats in zip((x, h, x), places, strict=True)
        )
        return first, second, third


def main() -> None:
    """Run every plan, with and without the gate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/layers/demo.json"))
    args = parser.parse_args()
    study, rows = Study(), []
    base = study.pair.score(study.model)
    for gate in (SHORT["gate"], 0.0):
        for ridge in (0.1, 0.3):
            for name, plan in PLANS.items():
                rows.append({"plan": name, "gate": gate, "ridge": ridge, **study.run(plan, gate, ridge)})
                print(rows[-1], flush=True)
    told = {"base": {"nll": base["nll"], "accuracy": base["accuracy"]}, "rows": rows, "machine": machine()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
