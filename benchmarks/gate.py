"""The prediction of `auto` against measurement: what it says of an upgrade, and what the upgrade then recovers.

    python benchmarks/gate.py [--out benchmarks/results/gate] [--real benchmarks/results/arc ...]

Points are pairs of backbones with an adapter: the demo pair, the pair reversed, damaged backbones, the old backbone
changed without a change of function, and other adapters. Thresholds were chosen on the development points, scored on
development items; the other points come from another seed and are scored on the test items. An upgrade holds when it
recovers at least half of what retraining on that new backbone gains. --real reads rows of gap.py.
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

import gate_points as points
import torch
from charts import predictions
from common import RESULTS, hide_loading_bars, stage, write_json
from demo_pair import DATA, FULL, TEMPLATE, DemoPair
from tables import gap, load, percent

from peft_lorasuite.training.finetune import finetune
from peft_lorasuite.upgrading import prediction
from peft_lorasuite.upgrading.auto import pick

HOLDS = 0.5
"""Share of retraining's gain from which on an upgrade holds."""
EPOCHS = {"names": {"epochs": 20}}
"""Tasks that need more epochs than the demo's own."""
METHODS = ("copy", "lorasuite", "transplant")
"""What `auto` can pick."""
ON_PROMPTS = ("transplant", "distill")
"""Methods whose prediction uses what their fit reached."""


@dataclass(frozen=True)
class Point:
    """A pair of backbones with an adapter.

    Attributes:
        name: Name in the table.
        side: Which of the demo pair's backbones the new one is made of.
        change: What is changed in it.
        old: Which of them is the old one.
        task: What the adapter teaches.
        dev: Whether it is one of those that the thresholds were chosen on.
        seed: Of the change.
    """

    name: str
    side: str = "new"
    change: points.Change = points.same
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
    Point("new: noise 20 %", change=points.noisy(0.2)),
    Point("new: embeddings shuffled", change=points.shuffled),
    Point("new: untrained", change=points.untrained),
    Point("old itself", "old"),
    Point("old, rotated", "old", points.rotated),
    Point("old, noise 20 %", "old", points.noisy(0.2)),
    Point("old, noise 50 %", "old", points.noisy(0.5)),
    Point("old, embeddings shuffled", "old", points.shuffled),
    Point("demo pair, adapter of a format", task="format", dev=False),
    Point("old, widened", "old", points.widened, dev=False, seed=1),
    Point("demo pair", dev=False),
    Point("new: untrained", change=points.untrained, dev=False, seed=1),
    Point("demo pair reversed", "old", old="new", dev=False),
    Point("old, permuted", "old", points.permuted, dev=False, seed=1),
    Point("demo pair, adapter of invented names", task="names", dev=False),
)
Adapters = Callable[[str, str], Path]


def adapters(scratch: Path) -> Adapters:
    """Return a function (backbone, task) -> its adapter, trained on first use; the demo's own needs no training."""

    def adapter(side: str, task: str) -> Path:
        folder = scratch / f"adapter-{side}-{task}"
        if side == "old" and task == "code":
            return DATA / "adapter"
        if not folder.exists():
            train, _, _ = points.TASKS[task]()
            plain = DemoPair(old=DATA / side)
            how = FULL | EPOCHS.get(task, {})
            model = plain.fresh(16, 32, seed=7, old=True)
            finetune(model, train, template=TEMPLATE, tokenizer=plain.old.tokenizer, seed=7, **how)
            model.save_pretrained(folder, save_embedding_layers=False)
        return folder

    return adapter


def build(point: Point, scratch: Path, adapter: Adapters) -> DemoPair:
    """Build the point's backbones."""
    generator = torch.Generator().manual_seed(point.seed)
    new = points.save(point.change(points.demo(point.side), generator), point.side, scratch / point.file)
    train, test, prompts = points.TASKS[point.task]()
    pair = DemoPair(DATA / point.old, new, adapter(point.old, point.task), dev=point.dev, train=train, test=test)
    pair.prompts = prompts
    return pair


def measure(point: Point, scratch: Path, adapter: Adapters) -> dict[str, Any]:
    """Build the point, read the scores off its map, retrain, and upgrade by every method."""
    pair = build(point, scratch, adapter)
    row: dict[str, Any] = {
        "point": point.name, "development": point.dev, "scores": asdict(prediction.scores(pair.map)),
        "auto": pick(pair.map, can_run=True).method,
        "old_adapted": pair.score(pair.adapted(), old=True)["nll"],
        "base": pair.score(pair.new.load(dtype="float32"))["nll"],
        "full": pair.score(pair.full(**EPOCHS.get(point.task, {})).model)["nll"],
    }  # fmt: skip
    return row | {"methods": {method: measure_method(pair, row, method) for method in METHODS}}


def measure_method(pair: DemoPair, row: dict[str, Any], method: str) -> dict[str, Any]:
    """Upgrade by a method, and score."""
    made = pair.upgraded(method)
    found = pair.score(made.model)
    share = gap(found, {"nll": row["base"]}, {"nll": row["full"]})
    return {
        "nll": found["nll"], "accuracy": found["accuracy"], "gap_recovered": share and round(share, 4),
        "fitted": {method: made.report.get(method, {})},
    }  # fmt: skip


def measure_again(point: Point, scratch: Path, adapter: Adapters, out: Path, method: str) -> None:
    """Measure one method of a point again; base and retraining stay."""
    path = out / f"{point.file}.json"
    row = json.loads(path.read_text(encoding="utf-8"))
    row["methods"][method] = measure_method(build(point, scratch, adapter), row, method)
    write_json(path, row)


def predict(row: dict[str, Any], method: str) -> tuple[prediction.Prediction, prediction.Prediction]:
    """Return the predictions for a measured point: from the map, and after the method has fitted."""
    scores = prediction.Scores(**row["scores"])
    return prediction.judge(scores, method), prediction.judge(scores, method, row["methods"][method]["fitted"])


def real_points(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Read points of real pairs from rows of gap.py that hold what a fit reached."""
    found = []
    for folder in folders:
        rows = load(folder)
        ceiling = next((rows[name] for name in ("full", "old-adapted") if name in rows), None)
        for name, row in rows.items():
            fitted = row.get("report") or {}
            share = gap(row, rows["base"], ceiling) if ceiling and fitted.get("name") in ON_PROMPTS else None
            if share is not None:
                found.append({"point": f"{folder.name}: {name}", "fitted": fitted, "gap_recovered": round(share, 4)})
    return found


def line(point: str, items: str, ends: str, method: str, early: Any, late: Any, share: float | None) -> str:
    """Return one line of the table."""
    good = (late.verdict != "retrain") == (share is not None and share >= HOLDS)
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
            lines.append(line(row["point"], items, ends, name, *predict(row, method), one["gap_recovered"]))
    aligned = prediction.Scores(1.0, 0.0, 0.0, None)
    for one in real:
        name = one["fitted"]["name"]
        both = prediction.judge(aligned, name), prediction.judge(aligned, name, one["fitted"])
        lines.append(line(f"real: {one['point']}", "test", "", name, *both, one["gap_recovered"]))
    counts: dict[str, tuple[int, int]] = {}
    for text in lines[2:]:
        cells = [cell.strip() for cell in text.split("|")]
        right, total = counts.get(cells[2], (0, 0))
        counts[cells[2]] = right + (cells[9] == "yes"), total + bool(cells[9])
    foot = ", ".join(f"{right} of {total} on {name} points" for name, (right, total) in counts.items())
    return "\n".join([*lines, "", f"Verdicts that are right: {foot}."])


def main() -> None:
    """Measure the points, write gate.md and gate.png beside them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "gate", help="folder for the points' JSON")
    parser.add_argument("--table", action="store_true", help="measure nothing: table and figure of the points there")
    parser.add_argument("--again", choices=METHODS, help="measure this method again where a point is there")
    parser.add_argument("--real", nargs="*", type=Path, default=[], help="folders of gap.py's rows")
    args = parser.parse_args()
    hide_loading_bars()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        adapter = adapters(Path(scratch))
        for point in POINTS:
            known = (args.out / f"{point.file}.json").is_file()
            if args.table and not known:
                continue
            if args.again and known:
                measure_again(point, Path(scratch), adapter, args.out, args.again)
            rows.append(stage(args.out, point.file, partial(measure, point, Path(scratch), adapter)))
    text = table(rows, real_points(args.real))
    (args.out / "gate.md").write_text(text + "\n", encoding="utf-8")
    drawn = [row | {"predicted": {method: predict(row, method)[1].gap for method in METHODS}} for row in rows]
    predictions(drawn, args.out / "gate.png")
    print(text)


if __name__ == "__main__":
    main()
