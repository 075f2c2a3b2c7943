"""How often the format that an adapter was trained on is found by asking the adapter, on the demo pair's old backbone.

    python benchmarks/formats.py --work FOLDER [--forms chatml,llama2,...]

An adapter is trained on the demo's task in each of ten formats, with a loss on the answers. The format is looked for
with the built-in prompts, and with texts that the old models write, as ``prompts="self"`` does. A minute a format.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from chat_demo import ChatPair
from common import RESULTS, hide_loading_bars, stage
from demo_formats import FORMATS, Trained, train_adapter

from peft_lorasuite.adapters.peft_model import load_with_adapter
from peft_lorasuite.adapters.reading import read_adapter
from peft_lorasuite.io.source import Source
from peft_lorasuite.methods.base import MethodInput
from peft_lorasuite.methods.behavior.prompt_sources import PromptSources, built_in_records

LENGTH = 8


def measure(trained: Trained, pair: ChatPair, *, seed: int) -> dict[str, Any]:
    """Look for the format of an adapter in both ways."""
    adapter = read_adapter(Source(str(trained.folder), "adapter"), trained.old.arch)
    inputs = MethodInput(adapter, pair.map, trained.old, pair.new, seed=seed)
    sources = PromptSources(inputs, trained.old, pair.new, count=128, length=LENGTH)
    found: dict[str, Any] = {"expected": trained.expected}
    with load_with_adapter(trained.old, adapter, merge=False) as model:
        form, trial = sources.detect(model, built_in_records())
        found["built_in"] = {"found": form.name, **trial.facts(form.name)["format"]}
        form, _, trial = sources.own_format(model)
        found["self"] = {"found": form.name, **trial.facts(form.name)["format"]}
    return found


def table(out: Path, forms: list[str]) -> str:
    """Return the formats that were found in Markdown."""
    rows = [stage(out, form, dict) for form in forms]
    lines = ["| trained on | expected | found by built-in prompts | by the old models' own |", "|---|---|---|---|"]
    lines += [
        f"| {form} | {row['expected']} | {row['built_in']['found']} | {row['self']['found']} |"
        for form, row in zip(forms, rows, strict=True)
    ]
    right = [sum(row[way]["found"] == row["expected"] for row in rows) for way in ("built_in", "self")]
    return "\n".join([*lines, f"| right | {len(rows)} | {right[0]} | {right[1]} |"])


def main() -> None:
    """Measure the formats, or read those that are there, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", default=",".join(FORMATS), help="comma-separated; all by default")
    parser.add_argument("--seed", type=int, default=2, help="seed of the sampling (default: 2)")
    parser.add_argument("--out", type=Path, default=RESULTS / "formats", help="folder for the rows' JSON")
    parser.add_argument("--work", type=Path, required=True, help="folder for backbones and adapters")
    args = parser.parse_args()
    hide_loading_bars()
    pair, forms = ChatPair(args.work, 0), args.forms.split(",")
    for form in forms:
        trained = train_adapter(args.work, form, "answers", pair.train)
        stage(args.out, form, lambda trained=trained: measure(trained, pair, seed=args.seed))
    text = table(args.out, forms)
    (args.out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
