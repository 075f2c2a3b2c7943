"""What `upgrade` prints at its end: the verdict, sample answers, what was left out, and what to do next."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING

from ..hub.card_task import task_values
from ..text.summary import one_line, without_template
from ..upgrading.report import lost_tensors

if TYPE_CHECKING:
    from ..upgrading.report import Report
    from ..upgrading.upgrade import Upgraded

SAMPLES = 2
"""Sample answers that are printed; the report may have more."""
SHOWN = 5
"""Tensors that are listed as not transferred; the report has all."""
WIDTH = 68
"""Characters of a prompt or an answer that are printed."""
SIDES = {"prompt": "prompt", "base": "new base", "upgraded": "upgraded", "old": "old"}
"""Text of a sample -> its label."""


def closing_text(output: str, report: Report, seconds: float) -> str:
    """Return the verdict, what was written, sample answers, and what was left out."""
    shares = ""
    if report.coverage is not None:
        shares = (
            f", {report.coverage:.0%} of the adapter's tensors transferred, {report.energy_kept:.1%} of the energy kept"
        )
    lines = [
        report.verdict,
        f"wrote {output}: {len(report.modules)} modules of rank {report.rank} by {report.method['name']}{shares} "
        f"({seconds} s)",
        *([f"  {report.task_summary}"] if report.task_summary else []),
    ]
    lost = [f"  {name}: {fate}" for name, fate in lost_tensors(report.tensors)]
    more = [f"  and {len(lost) - SHOWN} more: see lorasuite_report.json"] if len(lost) > SHOWN else []
    blocks: dict[str, list[str]] = {
        "sample answers": [
            "\n".join(f"  {label:<10}{one_line(sample[name], WIDTH)}" for name, label in SIDES.items())
            for sample in without_template(report.facts.get("samples", []))[:SAMPLES]
        ],
        "left out": [*lost[:SHOWN], *more],
        "hints": [f"  {hint}" for hint in report.facts.get("hints", [])],
    }
    return "\n".join([*lines, *(_block(title, body) for title, body in blocks.items() if body)])


def next_steps(output: str, upgraded: Upgraded, adapter: str) -> str:
    """Return the commands that load, check against the old adapter, evaluate and push the result."""
    folder, task = json.dumps(output), task_values(upgraded.report.to_dict(), str)
    labels = f", num_labels={task['num_labels']}" if task["num_labels"] else ""
    evaluate = f"peft-lorasuite evaluate {shlex.quote(output)} --data TEXTS"
    if not upgraded.adapter.task.classifies:
        revision = f",revision={upgraded.revision}" if upgraded.revision else ""
        tokenizer = "" if upgraded.tokenizer is None else f",tokenizer={output}"
        models = shlex.quote(f"pretrained={upgraded.base}{revision},peft={output}{tokenizer}")
        chat = " --apply_chat_template" if "chat" in upgraded.report.facts else ""
        evaluate = f"lm_eval --model hf --model_args {models}{chat} --tasks TASKS"
    steps = {
        "load": f"peft.{task['model_class']}.from_pretrained({folder}{labels})",
        "check": f"peft-lorasuite check {shlex.quote(output)} --old {shlex.quote(adapter)}",
        "evaluate": evaluate,
        "report": f"peft-lorasuite inspect {shlex.quote(output)} -o report.html",
        "push": f'peft_lorasuite.push_upgraded({folder}, "OWNER/NAME")',
    }
    verdict = upgraded.report.facts.get("prediction", {}).get("verdict")
    if upgraded.report.method["name"] == "transplant" and verdict != "holds":
        steps = {"instead": "the same command with --method distill, which trains and can recover more"} | steps
    unfit = {"SEQ_CLS": ["check"], "TOKEN_CLS": ["check"], "FEATURE_EXTRACTION": ["check", "evaluate"]}
    for name in unfit.get(upgraded.adapter.task.kind, []):
        del steps[name]
    return _block("next", [f"  {name:<10}{step}" for name, step in steps.items()])


def _block(title: str, body: list[str]) -> str:
    return "\n".join(["", title, *body])
