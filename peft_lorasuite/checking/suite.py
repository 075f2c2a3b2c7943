"""Accuracy of the new backbone with and without an adapter on tasks of lm-evaluation-harness, item by item."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from importlib.resources import as_file, files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import LoraSuiteError, short_message
from ..evaluation.harness import run_harness
from ..evaluation.scores import Evaluation, TaskScore, compare
from ..models.restore import fixed_seed
from .page import Line
from .written import Written

BATCH = 8
YAML = (".yaml", ".yml")


def load_suite(suite: Sequence[str]) -> dict[str, dict[str, Any] | None]:
    """Load the tasks of a suite with their items, before any model is run.

    Args:
        suite: Names of tasks or groups of the harness, or YAML files of tasks.

    Returns:
        Name -> the tasks by their own names: one, or those of a group; None where the harness is not installed.

    Raises:
        LoraSuiteError: If the harness does not know a task, or cannot load its items.
    """
    if not suite or find_spec("lm_eval") is None:
        return dict.fromkeys(map(_short, suite))
    from lm_eval.tasks import TaskManager

    own = [path for path in map(Path, suite) if _is_file(path)]
    with as_file(files("peft_lorasuite") / "data" / "tasks") as folder:
        places: list[Any] = [str(folder), *(str(path.expanduser().parent) for path in own)]
        manager = TaskManager(include_path=places, include_defaults=len(own) < len(suite))  # reading those takes long
        return {_short(name): _load_tasks(manager, name) for name in suite}


def kept_lines(
    written: Written, suite: Mapping[str, dict[str, Any] | None], limit: int | None, limits: Mapping[str, float],
    seed: int,
) -> list[Line]:  # fmt: skip
    """Compare the new backbone with and without the adapter on every task of a suite.

    Args:
        written: The adapter on its backbone.
        suite: From `load_suite`.
        limit: Items of a task at most; all if None.
        limits: The thresholds.
        seed: Seed of the harness's few-shot examples.

    Raises:
        LoraSuiteError: If a task has no score from 0 to 1 per item.
    """
    lines = []
    for name, tasks in suite.items():
        if tasks is None:
            reason = "lm-evaluation-harness is not installed (pip install peft-lorasuite[evaluate])"
            lines.append(Line.skipped(f"accuracy kept: {name}", reason))
            continue
        with fixed_seed(seed):
            before = _scores(written, tasks, limit, name, adapted=False)
        with fixed_seed(seed):
            after = _scores(written, tasks, limit, name, adapted=True)
        lines.append(_line(name, before, after, limits["kept"]))
    return lines


def _short(name: str) -> str:
    return Path(name).stem if _is_file(Path(name)) else name


def _is_file(path: Path) -> bool:
    return path.suffix in YAML and path.expanduser().is_file()


def _line(name: str, before: TaskScore, after: TaskScore, limit: float) -> Line:
    difference = compare(*(Evaluation((one,), "model", "harness") for one in (after, before))).tasks[0]
    low, high = difference.interval
    measured = (
        f"{before.value:.1%} to {after.value:.1%} on {before.n} items, {difference.losses} lost and {difference.wins}"
        f" won (difference {low:+.1%} to {high:+.1%})"
    )
    return Line.of(
        f"accuracy kept: {name}", -difference.value <= limit, measured, f"at most {limit:.1%} lost", difference.value
    )


def _load_tasks(manager: Any, name: str) -> dict[str, Any]:
    known = _short(name)
    if not manager.match_tasks([known]):
        raise LoraSuiteError("lm-evaluation-harness knows no such task", where="suite", got=repr(name))
    try:
        return dict(manager.load([known])["tasks"])
    except Exception as error:  # the tasks' own code and the Hub raise errors of many kinds
        raise LoraSuiteError(
            f"the task cannot be loaded: {short_message(error)}", where=f"suite, {name}",
            do="check the name and the connection",
        ) from error  # fmt: skip


def _scores(written: Written, tasks: Mapping[str, Any], limit: int | None, name: str, *, adapted: bool) -> TaskScore:
    """Run the tasks, and return the first score of each item."""
    model, tokenizer = written.model, copy.deepcopy(written.backbone.tokenizer)
    samples = None
    if limit is not None:
        samples = {key: list(range(min(limit, len(task.eval_docs)))) for key, task in tasks.items()}
    chat: dict[str, Any] = {
        "apply_chat_template": bool(tokenizer.chat_template), "system_instruction": None, "fewshot_as_multiturn": False
    }  # fmt: skip
    with nullcontext() if adapted else model.disable_adapter():
        results = run_harness(model, tokenizer, tasks, samples, BATCH, chat)
    items, outcomes = [], []
    for key in tasks:
        logged = sorted(results["samples"][key], key=lambda sample: sample["doc_id"])
        first = [sample for sample in logged if sample["filter"] == logged[0]["filter"]]
        metric = next((one for one in first[0]["metrics"] if _is_share(first, one)), None)
        if metric is None:
            raise LoraSuiteError("the task has no score from 0 to 1 per item", where=f"suite, {key}")
        items += [f"{key} {sample['doc_id']}" for sample in first]
        outcomes += [float(sample[metric]) for sample in first]
    return TaskScore(name, tuple(items), tuple(outcomes))


def _is_share(samples: Sequence[Mapping[str, Any]], metric: str) -> bool:
    return all(isinstance(one[metric], (bool, int, float)) and 0 <= one[metric] <= 1 for one in samples)
