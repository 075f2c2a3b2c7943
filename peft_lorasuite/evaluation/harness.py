"""Measure a model or an adapter as the LoRASuite paper does, on lm-evaluation-harness.

The tasks are the YAML files of ``data/tasks``; the harness asks, batches and counts, this module only says which items,
which prompt and which scoring. Needs the extra ``evaluate``.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import random
import tempfile
from collections.abc import Iterable, Mapping
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from ..errors import LoraSuiteError, check_seed, check_whole
from ..io.source import name_and_revision
from ..models.memory import head_in_one_piece
from ..text.templates import check_template
from . import answers
from . import tasks as items
from .published import published, published_pairs, published_rows
from .scores import Comparison, Difference, Evaluation, TaskScore, compare
from .tables import comparison_table, markdown_table
from .tasks import Benchmark, Item

__all__ = [
    "Comparison",
    "Difference",
    "Evaluation",
    "TaskScore",
    "compare",
    "comparison_table",
    "evaluate",
    "markdown_table",
    "published",
    "published_pairs",
    "published_rows",
]

SCORINGS = ("generate", "likelihood")


def evaluate(
    model: Any,
    *,
    tokenizer: Any = None,
    adapter: str | Path | None = None,
    suite: str | Iterable[str] = "commonsense",
    data: str | Path | None = None,
    limit: int | None = None,
    scoring: str = "generate",
    batch_size: int | str = 8,
    max_new_tokens: int | None = None,
    template: str | None = None,
    seed: int = 0,
) -> Evaluation:
    """Measure a model on the paper's benchmarks.

    Greedy decoding with the LLM-Adapters prompt and answer extraction (see `answers`). The items are local files
    (``data``: nothing is downloaded) or the Hub's datasets; that the Hub still serves the latter under the names in
    the task YAML is not tested offline (see `items`).

    Args:
        model: A loaded model (plain or PEFT), or a folder or Hub id (``owner/name@revision`` pins it) of a model or of
            a PEFT adapter.
        tokenizer: A tokenizer, or a folder or Hub id of one; by default the model's. It is not changed.
        adapter: Folder or Hub id of a PEFT adapter to put on ``model`` (a folder or Hub id then).
        suite: ``math``, ``commonsense``, or names of benchmarks separated by commas.
        data: Folder with the collection's files, ``NAME_test.json`` or ``NAME/test.json``.
        limit: Evaluate this many items of each benchmark (all, where there are fewer), drawn by ``seed``: the same
            for every model.
        scoring: ``generate`` reads the answer from a generated response. ``likelihood`` (commonsense only) picks the
            option that is most likely after "the correct answer is": fair to models without the format.
        batch_size: Prompts at a time, or the harness's ``"auto"``.
        max_new_tokens: Longest response in tokens; by default 256 for math and 32 for commonsense, as the papers.
        template: Prompt with ``{instruction}`` (and ``{input}``) in place of the LLM-Adapters one.
        seed: Draws the items of ``limit``. Greedy decoding needs no other.

    Raises:
        LoraSuiteError: for an unknown benchmark, option or file, for items that cannot be scored, or when
            lm-evaluation-harness is missing.
    """
    chosen = items.select(suite)
    _check_options(chosen, scoring, limit, template, max_new_tokens)
    check_seed(seed)
    local = None if data is None else _read_all(Path(data), chosen)
    _need_harness()
    overrides = _overrides(scoring, template)
    network, tokens = _load(model, adapter, tokenizer)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        tasks = _tasks(chosen, overrides, max_new_tokens, local, Path(scratch))
        samples = _samples(chosen, tasks, limit, seed)
        results = _run(network, tokens, tasks, samples, batch_size)
        scores = tuple(_score(b, results["samples"][b.task]) for b in chosen)
    settings = {
        "limit": limit,
        "seed": seed,
        "max_new_tokens": max_new_tokens,
        "template": template,
        "data": "Hub" if data is None else "local",
        "lm_eval": metadata.version("lm_eval"),
    }
    return Evaluation(scores, _name(model), scoring, None if adapter is None else str(adapter), settings)


def _check_options(
    chosen: tuple[Benchmark, ...], scoring: str, limit: int | None, template: str | None, max_new_tokens: int | None
) -> None:
    if scoring not in SCORINGS:
        raise LoraSuiteError("unknown scoring", got=repr(scoring), wanted=" or ".join(SCORINGS))
    math = [b.name for b in chosen if b.suite == "math"]
    if scoring == "likelihood" and math:
        what = "math answers are numbers or letters at the end of a text: there are no options to weigh"
        raise LoraSuiteError(what, where=", ".join(math), do="use scoring='generate'")
    for name, value in (("limit", limit), ("max_new_tokens", max_new_tokens)):
        if value is not None:
            check_whole(name, value)
    if template is not None:
        check_template(template)


def _read_all(folder: Path, chosen: tuple[Benchmark, ...]) -> dict[Benchmark, list[Item]]:
    paths = {b: items.local_file(folder, b) for b in chosen}
    missing = [f"{b.name}_test.json" for b, path in paths.items() if path is None]
    if missing:
        do = "put them there, or name only the benchmarks you have in suite"
        raise LoraSuiteError(f"no {', '.join(missing)}", where=folder, do=do)
    return {b: items.read_items(path, b) for b, path in paths.items() if path is not None}


def _need_harness() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        do = "pip install peft-lorasuite[evaluate]"
        raise LoraSuiteError("evaluation needs lm-evaluation-harness, which is not installed", do=do) from error


def _overrides(scoring: str, template: str | None) -> dict[str, Any]:
    """What differs from the task YAML, as its own keys."""
    if scoring == "generate":
        return {} if template is None else {"doc_to_text": functools.partial(answers.prompt, template=template)}
    return {
        "output_type": "multiple_choice",
        "doc_to_text": functools.partial(answers.forced_prompt, template=template),
        "doc_to_choice": answers.choices,
        "doc_to_target": answers.choice_index,
        "target_delimiter": " ",
        "process_results": None,
        "generation_kwargs": None,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


def _tasks(
    chosen: tuple[Benchmark, ...],
    overrides: Mapping[str, Any],
    max_new_tokens: int | None,
    local: Mapping[Benchmark, list[Item]] | None,
    scratch: Path,
) -> dict[str, Any]:
    """Let the harness build its task objects: YAML, overrides and, for local items, a copy that was checked."""
    from lm_eval.tasks import TaskManager

    specs = []
    for b in chosen:
        spec = {"task": b.task, **overrides}
        if local is not None:
            path = scratch / f"{b.task}.jsonl"
            path.write_text("".join(json.dumps(item) + "\n" for item in local[b]), encoding="utf-8")
            kwargs = {"data_files": {"test": str(path)}, "cache_dir": str(scratch)}
            spec |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": kwargs, "process_docs": None}
        specs.append(spec)
    with resources.as_file(resources.files("peft_lorasuite") / "data" / "tasks") as folder:
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        try:
            tasks = manager.load({"group": "lorasuite", "task": specs})["tasks"]
        except OSError as error:  # no network, offline mode, or no such dataset
            do = "give a folder with the files as data, or check the connection"
            raise LoraSuiteError("the items could not be fetched from the Hub", got=error, do=do) from error
    for task in tasks.values():
        if max_new_tokens is not None and task.get_config("output_type") == "generate_until":
            task.set_config(key="generation_kwargs", value={"max_gen_toks": max_new_tokens}, update=True)
    return tasks


def _samples(
    chosen: tuple[Benchmark, ...], tasks: Mapping[str, Any], limit: int | None, seed: int
) -> dict[str, list[int]] | None:
    """Which items of each task to use; None for all. A benchmark with fewer than ``limit`` items is used whole."""
    if limit is None:
        return None
    drawn = {}
    for b in chosen:
        count = len(tasks[b.task].eval_docs)
        # a draw of its own for each benchmark: it does not depend on what else is evaluated
        drawn[b.task] = sorted(random.Random(f"{seed} {b.name}").sample(range(count), min(limit, count)))
    return drawn


def _load(model: Any, adapter: str | Path | None, tokenizer: Any) -> tuple[Any, Any]:
    """Load what is given by name. The tokenizer is copied, because the harness sets its padding."""
    from ..adapters.loading import open_tokenizer

    if isinstance(model, str | Path):
        network, revision = _load_by_name(str(model), adapter)
    elif adapter is not None:
        raise LoraSuiteError("adapter needs a folder or Hub id as model", do="load the adapter on the model yourself")
    else:
        network, revision = model, None
    return network, copy.deepcopy(open_tokenizer(network, tokenizer, revision))


def _load_by_name(model: str, adapter: str | Path | None) -> tuple[Any, str | None]:
    """Load a model, and the adapter on it; return the backbone's revision beside it."""
    from ..adapters.loading import adapter_folder, load_model, put_on
    from ..adapters.peft_format import CONFIG
    from ..adapters.reading import named_base
    from ..io.source import Source

    base = Source(*_place(model, "model"))
    upper = None if adapter is None else Source(*_place(adapter, "adapter"))
    if upper is None and base.fetch(CONFIG) is not None:
        upper, (name, pinned) = Source(*_place(model, "adapter")), named_base(base, do="pass model and adapter")
        base = Source(name, "model", pinned, hub_only=base.folder is None)
    if upper is None:
        return load_model(base), base.revision
    folder = adapter_folder(upper)
    return put_on(load_model(base), folder, upper, base=base), base.revision


def _place(text: str | Path, kind: str) -> tuple[str, str, str | None]:
    name, revision = name_and_revision(text)
    return name, kind, revision


def _run(
    network: Any, tokenizer: Any, tasks: Mapping[str, Any], samples: dict[str, list[int]] | None, batch_size: int | str
) -> Mapping[str, Any]:
    from lm_eval.evaluator import evaluate as run
    from lm_eval.models.huggingface import HFLM

    was_training = network.training
    try:
        harness: Any = HFLM  # its registering decorator hides the constructor's signature from the type checker
        wrapped = harness(pretrained=network, tokenizer=tokenizer, batch_size=batch_size)
        loaded: Any = {"tasks": tasks}
        # bootstrap_iters=0: the intervals are computed from the outcomes
        with head_in_one_piece(network):
            results = run(lm=wrapped, task_dict=loaded, samples=samples, bootstrap_iters=0)
    finally:
        network.train(was_training)
    if results is None:
        raise LoraSuiteError("no results on this process", do="run the evaluation in a single process")
    return results


def _score(benchmark: Benchmark, logged: list[dict[str, Any]]) -> TaskScore:
    logged = sorted(logged, key=lambda sample: sample["doc_id"])
    prints = tuple(_fingerprint(sample["doc"]) for sample in logged)
    outcomes = tuple(float(sample["acc"]) for sample in logged)
    answered = [sample["answered"] for sample in logged if "answered" in sample]
    return TaskScore(benchmark.name, prints, outcomes, sum(answered) / len(answered) if answered else None)


def _fingerprint(item: Item) -> str:
    text = "\0".join((item["instruction"], item["input"], item["answer"]))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _name(model: Any) -> str:
    if isinstance(model, str | Path):
        return str(model)
    return getattr(model.config, "_name_or_path", "") or type(model).__name__
