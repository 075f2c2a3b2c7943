"""What each option of `transplant` and `distill` is worth: one at a time, over the adapters of the demo pair.

    python benchmarks/ablations.py --work FOLDER [--adapters ADAPTER,...] [--rows ROW,...] [--seeds 0,1,2]

The adapters do the demo's task in several prompt formats, with a loss on the answers or on all tokens. Each is upgraded
with 300 unlabeled prompts of its format, with the defaults and with one option changed, and scored on development
questions, which no prompt asks: likelihood, answers that are exactly right, and on other text the divergence from the
new backbone. A cell is the mean over the seeds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from chat_demo import ChatPair
from common import RESULTS, hide_loading_bars, stage
from demo_formats import score_answers, train_adapter, unlabeled
from demo_language import PEOPLE, World, texts
from demo_pair import timed
from side_effects import measure as measure_other_text

from peft_lorasuite import upgrade
from peft_lorasuite.model import attach

BASE: dict[str, dict[str, Any]] = {
    "transplant": {"length": 8, "rank": 64, "samples": 0},
    "distill": {"length": 8, "epochs": 5, "learning_rate": 3e-3, "samples": 0},
}
"""Method -> options of all of its rows, those of the other benchmarks of the demo pair."""
SHARED: dict[str, dict[str, Any]] = {
    "defaults": {},
    "teacher_weight=0": {"teacher_weight": 0.0},
    "teacher_weight=0.5": {"teacher_weight": 0.5},
    "anchor_tokens=0": {"anchor_tokens": 0},
}
ABLATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "transplant": SHARED | {
        "anchor_text_tokens=3000": {"anchor_text_tokens": 3000},
        "refine_steps=0": {"refine_steps": 0},
        "refine_steps=20": {"refine_steps": 20},
        "edit_facts=false": {"edit_facts": False},
    },
    "distill": SHARED | {
        "anchor_text_tokens=0": {"anchor_text_tokens": 0},
        "no anchors": {"anchor_tokens": 0, "anchor_text_tokens": 0},
        "start=false": {"start": False},
        "batch_size=2": {"batch_size": 2},
    },
}  # fmt: skip
"""Method -> row -> changed options."""
ADAPTERS = ("question-answers", "question-all", "alpaca-answers", "llama2-answers", "llama2-all", "chatml-answers")
"""Prompt format and the tokens that had a loss."""
ITEMS = 300
OTHER_SEED = 77


class Study:
    """Upgrades of one adapter with one seed.

    Args:
        work: Folder for backbones and adapters.
        adapter: Format and loss of the adapter.
        seed: Seed of the adapter's training and of the upgrades.
        count: Prompts of an upgrade.
    """

    def __init__(self, work: Path, adapter: str, seed: int, count: int) -> None:
        self.form, _, loss = adapter.partition("-")
        self.pair, self.count = ChatPair(work, seed, dev=True), count
        self.trained = train_adapter(work, self.form, loss, self.pair.train, seed)

    @cached_property
    def other(self) -> list[str]:
        """Texts of the demo's language, most of which have nothing to do with the task."""
        return list(islice(texts(World.create(), list(PEOPLE), OTHER_SEED), 200))

    def measure(self, row: str) -> dict[str, Any]:
        """Upgrade as a row says, and score."""
        if row == "base":
            return self.score(self.pair.new.load(dtype="float32"))
        method, _, name = row.partition(", ")
        options = {**BASE[method], "prompts": self.count, **ABLATIONS[method][name]}
        _ = self.pair.map  # built before the clock starts

        def work() -> Any:
            return upgrade(
                self.trained.folder, self.pair.map, method=method, options=options, old=self.pair.old,
                new=self.pair.new, prompts=unlabeled(self.form, self.pair.train[: self.count]), seed=self.pair.seed,
            )  # fmt: skip

        found, seconds, _ = timed(work)
        model = attach(self.pair.new.load(dtype="float32"), found)
        other = measure_other_text(model.eval(), self.pair.new, self.other, ["default"])["default"]
        divergence = {"other_text": other["divergence_from_base"]}
        return self.score(model) | divergence | {"making_seconds": round(seconds, 1)}

    def score(self, model: Any) -> dict[str, Any]:
        """Score the development questions."""
        return score_answers(model, self.pair.new.tokenizer, self.form, self.pair.test[:ITEMS])


def table(out: Path, method: str, adapters: Sequence[str], rows: Sequence[str], seeds: Sequence[int]) -> str:
    """Return the rows of a method in Markdown: exact answers in %, and divergence on other text in brackets."""

    def mean(adapter: str, row: str, key: str) -> float:
        return statistics.mean(stage(out / adapter / f"seed-{seed}", row, dict)[key] for seed in seeds)

    lines = [f"| `{method}` | {' | '.join(adapters)} | NLL |", f"|---|{'---:|' * (len(adapters) + 1)}"]
    for name in rows:
        row = f"{method}, {name}"
        cells = [f"{mean(one, row, 'exact'):.1%} ({mean(one, row, 'other_text'):.2f})" for one in adapters]
        nll = statistics.mean(mean(one, row, "nll") for one in adapters)
        lines.append(f"| {name} | {' | '.join(cells)} | {nll:.3f} |")
    return "\n".join(lines)


def main() -> None:
    """Run the rows, or read those that are there, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", default=",".join(ADAPTERS), help="FORMAT-LOSS, comma-separated")
    parser.add_argument("--methods", default=",".join(ABLATIONS), help="comma-separated (default: both)")
    parser.add_argument("--rows", help="semicolon-separated; all by default")
    parser.add_argument("--seeds", default="0", help="comma-separated (default: 0)")
    parser.add_argument("--prompts", type=int, default=300, help="prompts of each upgrade (default: 300)")
    parser.add_argument("--out", type=Path, default=RESULTS / "ablations", help="folder for the rows' JSON")
    parser.add_argument("--work", type=Path, required=True, help="folder for backbones and adapters")
    args = parser.parse_args()
    hide_loading_bars()
    seeds, adapters, tables = [int(text) for text in args.seeds.split(",")], args.adapters.split(","), []
    for method in args.methods.split(","):
        rows = args.rows.split(";") if args.rows else list(ABLATIONS[method])
        for seed in seeds:
            for adapter in adapters:
                study = Study(args.work, adapter, seed, args.prompts)
                for row in ("base", *(f"{method}, {name}" for name in rows)):
                    stage(args.out / adapter / f"seed-{seed}", row, lambda study=study, row=row: study.measure(row))
        tables.append(table(args.out, method, adapters, rows, seeds))
        (args.out / f"{method}.md").write_text(tables[-1] + "\n", encoding="utf-8")
    print("\n\n".join(tables))


if __name__ == "__main__":
    main()
