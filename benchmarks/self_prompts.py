"""Prompts that the adapter writes itself, against those of its task and the built-in ones, on the demo pair.

    python benchmarks/self_prompts.py --work FOLDER [--forms question,llama2] [--losses answers,all] [--rows ROW,...]

Adapters of the old backbone are trained on the demo's task: as questions, and on conversations through a template like
that of Llama 2; with a loss on the answers alone, and on prompts and answers. Each is upgraded with prompts of the
task, with built-in ones, and with its own, and scored by the likelihood of 300 test answers: in the adapter's prompt
format or, for conversations, through ChatML on the new side. A few minutes an adapter on one core.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from chat_demo import ChatPair
from common import RESULTS, hide_loading_bars, stage
from demo_formats import LOSSES, score_answers, train_adapter, unlabeled
from demo_pair import timed

from peft_lorasuite import upgrade
from peft_lorasuite.model import attach

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "transplant": ("transplant", {"rank": 64}),
    "distill": ("distill", {"epochs": 5, "learning_rate": 3e-3}),
}
"""Method -> its name and options."""
SOURCES = ("task", "built-in", "self")
ROWS = ("base", *(f"{method}-{source}" for method in METHODS for source in SOURCES))
ITEMS = 300


class Upgrades:
    """Upgrades of one adapter.

    Args:
        pair: The demo pair with chat templates.
        work: Folder for adapters.
        form: Format of the adapter.
        loss: Tokens that had a loss.
        count: Prompts of each upgrade.
    """

    def __init__(self, pair: ChatPair, work: Path, form: str, loss: str, count: int) -> None:
        self.pair, self.form, self.count = pair, form, count
        self.trained = train_adapter(work, form, loss, pair.train, pair.seed)

    def prompts(self, source: str) -> Any:
        """Return the prompts of a source."""
        return unlabeled(self.form, self.pair.train[: self.count]) if source == "task" else source

    def score(self, model: Any) -> dict[str, Any]:
        """Score the test answers."""
        return score_answers(model, self.pair.new.tokenizer, self.form, self.pair.test[:ITEMS])

    def measure(self, row: str) -> dict[str, Any]:
        """Upgrade as a row says, and score."""
        if row == "base":
            return self.score(self.pair.new.load(dtype="float32"))
        name, source = row.split("-", 1)
        method, options = METHODS[name]
        options = {**options, "length": 8, "prompts": self.count}
        _ = self.pair.map

        def work() -> Any:
            return upgrade(
                self.trained.folder, self.pair.map, method=method, options=options, old=self.pair.old,
                new=self.pair.new, prompts=self.prompts(source), seed=self.pair.seed,
            )  # fmt: skip

        found, seconds, _ = timed(work)
        facts = found.report.facts
        kept = {key: facts[key] for key in ("prompts", "format", "prediction") if key in facts}
        return self.score(attach(self.pair.new.load(dtype="float32"), found)) | kept | {"making": round(seconds, 1)}


def table(out: Path, adapters: list[tuple[str, str]], rows: list[str]) -> str:
    """Return in Markdown the share that each source recovers of what the task's prompts do."""
    lines = [
        "| adapter | loss on | method | task NLL | built-in | self | share of `self` | kept of sampled | seconds |"
    ]
    lines.append("|---|---|---|---:|---:|---:|---:|---:|---:|")
    for form, loss in adapters:
        folder = out / f"{form}-{loss}"
        base = stage(folder, "base", dict)["nll"]
        for method in METHODS:
            if f"{method}-self" not in rows:
                continue
            task, built_in, own = (stage(folder, f"{method}-{source}", dict) for source in SOURCES)
            shares = [(base - one["nll"]) / (base - task["nll"]) for one in (built_in, own)]
            facts = own["prompts"]
            figures = f"{task['nll']:.3f} of {base:.3f} | {shares[0]:.0%} | {own['nll']:.3f} | {shares[1]:.0%}"
            kept = f"{facts['kept']} of {facts['sampled']} | {facts['seconds']:.0f}"
            lines.append(f"| {form} | {loss} | `{method}` | {figures} | {kept} |")
    return "\n".join(lines)


def main() -> None:
    """Run the rows, or read those that are there, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", default="question,llama2", help="comma-separated formats of adapters")
    parser.add_argument("--losses", default=",".join(LOSSES), help="comma-separated (default: answers,all)")
    parser.add_argument("--rows", default=",".join(ROWS), help="comma-separated; all by default")
    parser.add_argument("--prompts", type=int, default=300, help="prompts of each upgrade (default: 300)")
    parser.add_argument("--out", type=Path, default=RESULTS / "self_prompts", help="folder for the rows' JSON")
    parser.add_argument("--work", type=Path, required=True, help="folder for backbones and adapters")
    args = parser.parse_args()
    hide_loading_bars()
    pair, rows = ChatPair(args.work, 0), args.rows.split(",")
    adapters = [(form, loss) for form in args.forms.split(",") for loss in args.losses.split(",")]
    for form, loss in adapters:
        made = Upgrades(pair, args.work, form, loss, args.prompts)
        for row in rows:
            stage(args.out / f"{form}-{loss}", row, lambda made=made, row=row: made.measure(row))
    text = table(args.out, adapters, rows)
    (args.out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
