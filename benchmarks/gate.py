"""The gate against measurement: what `choice.predict` says of an upgrade, and what the upgrade then recovers.

    python benchmarks/gate.py [--out benchmarks/results/gate] [--real benchmarks/results/arc ...]

Points are pairs of backbones with an adapter: the demo pair, the pair reversed, its backbones damaged, the old backbone
changed without a change of function, and other adapters. On development points, scored on development items, the
thresholds were chosen; check points were drawn from another seed and are scored on the test items. An upgrade counts as
held when it recovers at least half of what retraining on that new backbone gains. --real reads rows of gap.py.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gate_pairs as pairs
import torch
from common import stage
from demo_charts import gate_chart
from demo_gap import quiet
from demo_pair import DATA, FULL, TEMPLATE, DemoPair
from gate_tasks import TASKS
from table import gap, load, percent

from peft_lorasuite.training.finetune import finetune
from peft_lorasuite.upgrading import auto as choice

HELD = 0.5
"""Share of retraining's gain from which on an upgrade counts as held."""
EPOCHS = {"names": {"epochs": 20}}
"""Tasks that take more passes than the demo's own."""
METHODS = ("copy", "lorasuite", "transplant")
"""What `auto` can pick."""


@dataclass(frozen=True)
class Point:
    """A pair of backbones with an adapter.

    Attributes:
        name: What it is.
        side: Which of the demo pair's backbones the new one is made of.
        change: How.
        old: Which of them is the old one.
        task: What the adapter teaches.
        dev: Whether it is one of those that the thresholds were chosen on.
        seed: Of the change.
    """

    name: str
    side: str = "new"
    change: Callable[..., Any] = pairs.same
    old: str = "old"
    task: str = "code"
    dev: bool = True
    seed: int = 0

    @property
    def file(self) -> str:
        """Name of its row's file."""
        return "-".join([*re.findall(r"\w+", self.name), "development" if self.dev else "test"])


POINTS = (
    Point("demo pair"),
    Point("new: noise 20 %", change=pairs.noisy(0.2)),
    Point("new: embeddings shuffled", change=pairs.shuffled),
    Point("new: untrained", change=pairs.untrained),
    Point("old itself", "old"),
    Point("old, rotated", "old", pairs.rotated),
    Point("old, noise 20 %", "old", pairs.noisy(0.2)),
    Point("old, noise 50 %", "old", pairs.noisy(0.5)),
    Point("old, embeddings shuffled", "old", pairs.shuffled),
    Point("demo pair, adapter of a format", task="format", dev=False),
    Point("old, widened", "old", pairs.widened, dev=False, seed=1),
    Point("demo pair", dev=False),
    Point("new: untrained", change=pairs.untrained, dev=False, seed=1),
    Point("demo pair reversed", "old", old="new", dev=False),
    Point("old, permuted", "old", pairs.permuted, dev=False, seed=1),
    Point("demo pair, adapter of invented names", task="names", dev=False),
)


def adapters(scratch: Path) -> Callable[[str, str], Path]:
    """Return a function (backbone, task) -> its adapter, trained when first asked for; the demo's own is there."""

    def made(side: str, task: str) -> Path:
        folder = scratch / f"adapter-{side}-{task}"
        if side == "old" and task == "code":
            return DATA / "adapter"
        if not folder.exists():
            train, _, _ = TASKS[task]()
            plain = DemoPair(old=DATA / side)
            how = FULL | EPOCHS.get(task, {})
            model = plain.fresh(16, 32, seed=7, old=True)
            finetune(model, train, template=TEMPLATE, tokenizer=plain.old.tokenizer, seed=7, **how)
            model.save_pretrained(folder, save_embedding_layers=False)
        return folder

    return made


def built(point: Point, scratch: Path, adapter: Callable[[str, str], Path]) -> DemoPair:
    """Build the point's backbones."""
    generator = torch.Generator().manual_seed(point.seed)
    new = pairs.save(point.change(pairs.demo(point.side), generator), point.side, scratch / point.file)
    train, test, prompts = TASKS[point.task]()
    pair = DemoPair(DATA / point.old, new, adapter(point.old, point.task), dev=point.dev, train=train, test=test)
    pair.prompts = prompts
    return pair


def measure(point: Point, scratch: Path, adapter: Callable[[str, str], Path]) -> dict[str, Any]:
    """Build the point, ask the gate, upgrade by every method, and retrain."""
    pair = built(point, scratch, adapter)
    picked = choice.pick(pair.map, can_run=True).method
    row: dict[str, Any] = {
        "point": point.name, "development": point.dev, "scores": asdict(choice.scores(pair.map)), "auto": picked,
        "old_adapted": pair.score(pair.adapted(), old=True)["nll"],
        "base": pair.score(pair.new.load(dtype="float32"))["nll"],
        "full": pair.score(pair.full(**EPOCHS.get(point.task, {})).model)["nll"],
    }  # fmt: skip
    return row | {"methods": {method: upgraded(pair, row, method) for method in METHODS}}


def upgraded(pair: DemoPair, row: dict[str, Any], method: str) -> dict[str, Any]:
    """Upgrade by a method, and score."""
    made = pair.upgraded(method)
    found = pair.score(made.model)
    share = gap(found, {"nll": row["base"]}, {"nll": row["full"]})
    return {
        "nll": found["nll"], "accuracy": found["accuracy"], "gap_recovered": share and round(share, 4),
        "fitted": {method: made.report.get(method, {})},
    }  # fmt: skip


def measure_again(point: Point, scratch: Path, adapter: Callable[[str, str], Path], out: Path, method: str) -> None:
    """Measure one method of a point anew; base and retraining stay."""
    path = out / f"{point.file}.json"
    row = json.loads(path.read_text(encoding="utf-8"))
    row["methods"][method] = upgraded(built(point, scratch, adapter), row, method)
    path.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")


def told(row: dict[str, Any], method: str) -> tuple[choice.Prediction, choice.Prediction]:
    """Return what the gate says of a measured point today: before and after the method has fitted."""
    scores = choice.Scores(**row["scores"])
    return choice.judge(scores, method), choice.judge(scores, method, row["methods"][method]["fitted"])


def real_points(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Read points of real pairs from rows of gap.py that hold a prediction."""
    found = []
    for folder in folders:
        rows = load(folder)
        ceiling = next((rows[name] for name in ("full", "old-adapted") if name in rows), None)
        for name, row in rows.items():
            fitted = row.get("report") or {}
            share = gap(row, rows["base"], ceiling) if ceiling and fitted.get("name") in choice.BEHAVIOUR else None
            older = fitted.get("name") == "transplant" and "divergence" not in fitted["transplant"]
            if share is not None and not older:  # an older row does not tell what its fit reached
                found.append({"point": f"{folder.name}: {name}", "fitted": fitted, "gap_recovered": round(share, 4)})
    return found


def line(point: str, items: str, ends: str, method: str, early: Any, late: Any, share: float | None) -> str:
    """Return one line of the table."""
    good = (late.verdict == "holds") == (share is not None and share >= HELD)
    cells = [point, items, ends, method, percent(early.gap), percent(late.gap), percent(share), late.verdict]
    return f"| {' | '.join([*cells, '' if share is None else 'yes' if good else '**no**'])} |"


def table(rows: Sequence[dict[str, Any]], real: Sequence[dict[str, Any]]) -> str:
    """Return the table in Markdown: a line for every point and method, what `auto` picks in bold."""
    lines = [
        "| point | items | base -> retrained (old with adapter) | method | predicted by the map | after the fit | "
        "measured | verdict | right |",
        "|---|---|---:|---|---:|---:|---:|---|---|",
    ]
    for row in rows:
        for method, one in row["methods"].items():
            ends = f"{row['base']:.2f} -> {row['full']:.2f} ({row['old_adapted']:.2f})"
            name = f"**{method}**" if method == row["auto"] else method
            items = "development" if row["development"] else "test"
            lines.append(line(row["point"], items, ends, name, *told(row, method), one["gap_recovered"]))
    aligned = choice.Scores(1.0, 0.0, 0.0, None)
    for one in real:
        name = one["fitted"]["name"]
        both = choice.judge(aligned, name), choice.judge(aligned, name, one["fitted"])
        lines.append(line(f"real: {one['point']}", "test", "", name, *both, one["gap_recovered"]))
    counts = {}
    for text in lines[2:]:
        cells = [cell.strip() for cell in text.split("|")]
        right, total = counts.get(cells[2], (0, 0))
        counts[cells[2]] = right + (cells[9] == "yes"), total + bool(cells[9])
    foot = ", ".join(f"{right} of {total} on {name} points" for name, (right, total) in counts.items())
    return "\n".join([*lines, "", f"Verdicts that are right: {foot}."])


def main() -> None:
    """Measure the points, write gate.md and gate.png beside them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gate")
    parser.add_argument("--table", action="store_true", help="measure nothing: table and figure of the rows there are")
    parser.add_argument("--again", choices=METHODS, help="measure this method anew where a point is there")
    parser.add_argument("--real", nargs="*", type=Path, default=[], help="folders of gap.py's rows")
    args = parser.parse_args()
    quiet()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        adapter = adapters(Path(scratch))
        chosen = [point for point in POINTS if not args.table or (args.out / f"{point.file}.json").is_file()]
        for point in chosen:
            if args.again and (args.out / f"{point.file}.json").is_file():
                measure_again(point, Path(scratch), adapter, args.out, args.again)
            rows.append(stage(args.out, point.file, partial(measure, point, Path(scratch), adapter)))
    text = table(rows, real_points(args.real))
    (args.out / "gate.md").write_text(text + "\n", encoding="utf-8")
    gate_chart([row | {"told": {m: told(row, m)[1].gap for m in METHODS}} for row in rows], args.out / "gate.png")
    print(text)


if __name__ == "__main__":
    main()
