"""Evaluation of models and adapters as in the LoRASuite paper, on lm-evaluation-harness.

The tasks are the YAML files of ``data/tasks``. The harness generates and scores; this module selects items, prompt and
scoring. Needs the extra ``evaluate``.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import random
from collections.abc import Iterable, Mapping
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from ..errors import LoraSuiteError, check_seed
from ..io.source import LoadOptions, Source, split_revision
from ..io.temporary import temporary_folder
from ..models.memory import contiguous_head_input
from ..text.templates import format_prompt
from . import answers
from .options import check_chat, check_options
from .published import published, published_pairs, published_rows
from .scores import Comparison, Difference, Evaluation, TaskScore, compare
from .tables import comparison_table, markdown_table
from .tasks import Benchmark, Item, local_file, read_items, select

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
    apply_chat_template: bool = False,
    system_instruction: str | None = None,
    fewshot_as_multiturn: bool = False,
    trust_remote_code: bool = False,
    seed: int = 0,
) -> Evaluation:
    """Evaluate a model on the paper's benchmarks.

    Uses greedy decoding with the prompt and the answer extraction of LLM-Adapters. Items come from local files
    (``data``), or from datasets of the Hub.

    Args:
        model: A loaded model (plain or PEFT), or the folder or Hub id (``owner/name@revision`` selects a revision) of
            a model or a PEFT adapter.
        tokenizer: Tokenizer, or its folder or Hub id; by default that of the model. It is not changed.
        adapter: Folder or Hub id of a PEFT adapter to load on ``model``, which must be a folder or Hub id then.
        suite: ``"math"``, ``"commonsense"``, or names of benchmarks, separated by commas.
        data: Folder with the files of the LLM-Adapters collection, ``NAME_test.json`` or ``NAME/test.json``.
        limit: Maximum number of items per benchmark, drawn by ``seed``, the same for every model; all if None.
        scoring: ``"generate"`` extracts the answer from a generated response. ``"likelihood"`` (commonsense only)
            picks the most likely option after "the correct answer is", which is fair to models without the format.
        batch_size: Prompts per batch, or ``"auto"`` of the harness.
        max_new_tokens: Maximum length of a response; by default 256 for math and 32 for commonsense, as in the papers.
        template: Prompt template with ``{instruction}`` (and ``{input}``); by default that of LLM-Adapters.
        apply_chat_template: Whether the harness renders the prompt as a user turn by the tokenizer's chat template.
        system_instruction: System prompt, as in the harness.
        fewshot_as_multiturn: Whether few-shot examples are turns of the conversation, as in the harness.
        trust_remote_code: Whether transformers may run code of the repository of a model given by name.
        seed: Seed of the items of ``limit``.

    Returns:
        The scores; `compare` compares two of them item by item.

    Raises:
        LoraSuiteError: If a benchmark or option is unknown, a file is missing or malformed, an item cannot be scored,
            or lm-evaluation-harness is not installed.
    """
    benchmarks = select(suite)
    check_options(benchmarks, scoring, limit, template, max_new_tokens)
    check_seed(seed)
    chat = {
        "apply_chat_template": apply_chat_template, "system_instruction": system_instruction,
        "fewshot_as_multiturn": fewshot_as_multiturn,
    }  # fmt: skip
    check_chat(chat)
    local = None if data is None else _read_local_items(Path(data), benchmarks)
    require_harness()
    overrides = _task_overrides(scoring, template)
    loaded_model, loaded_tokenizer = _load(model, adapter, tokenizer, trust_remote_code)
    with temporary_folder() as scratch:
        tasks = _load_tasks(benchmarks, overrides, max_new_tokens, local, scratch)
        samples = _draw_samples(benchmarks, tasks, limit, seed)
        results = run_harness(loaded_model, loaded_tokenizer, tasks, samples, batch_size, chat)
        scores = tuple(_score_task(b, results["samples"][b.task]) for b in benchmarks)
    settings = {
        "limit": limit,
        "seed": seed,
        "max_new_tokens": max_new_tokens,
        "template": template,
        "data": "Hub" if data is None else "local",
        "lm_eval": metadata.version("lm_eval"),
        **{name: value for name, value in chat.items() if value},
    }
    return Evaluation(scores, _model_name(model), scoring, None if adapter is None else str(adapter), settings)


def _read_local_items(folder: Path, benchmarks: tuple[Benchmark, ...]) -> dict[Benchmark, list[Item]]:
    paths = {b: local_file(folder, b) for b in benchmarks}
    missing = [f"{b.name}_test.json" for b, path in paths.items() if path is None]
    if missing:
        do = "add them, or limit suite to the benchmarks that are there"
        raise LoraSuiteError(f"the folder has no {', '.join(missing)}", where=folder, do=do)
    return {b: read_items(path, b) for b, path in paths.items() if path is not None}


def require_harness() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        do = "pip install peft-lorasuite[evaluate]"
        raise LoraSuiteError("evaluation needs lm-evaluation-harness, which is not installed", do=do) from error


def _task_overrides(scoring: str, template: str | None) -> dict[str, Any]:
    """Return the keys of the task YAML that ``scoring`` and ``template`` replace."""
    if scoring == "generate":
        return {} if template is None else {"doc_to_text": functools.partial(format_prompt, template=template)}
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


def _load_tasks(
    benchmarks: tuple[Benchmark, ...],
    overrides: Mapping[str, Any],
    max_new_tokens: int | None,
    local: Mapping[Benchmark, list[Item]] | None,
    scratch: Path,
) -> dict[str, Any]:
    """Load the tasks in the harness, from YAML, overrides and, for local files, a copy of the checked items."""
    from lm_eval.tasks import TaskManager

    specs = []
    for b in benchmarks:
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
            do = "pass a folder with the files as data, or check the connection"
            raise LoraSuiteError("the items could not be downloaded from the Hub", got=error, do=do) from error
    for task in tasks.values():
        if max_new_tokens is not None and task.get_config("output_type") == "generate_until":
            task.set_config(key="generation_kwargs", value={"max_gen_toks": max_new_tokens}, update=True)
    return tasks


def _draw_samples(
    benchmarks: tuple[Benchmark, ...], tasks: Mapping[str, Any], limit: int | None, seed: int
) -> dict[str, list[int]] | None:
    """Return the indices of the items of each task; None for all."""
    if limit is None:
        return None
    samples = {}
    for b in benchmarks:
        count = len(tasks[b.task].eval_docs)
        # one generator per benchmark: its items do not depend on what else is evaluated
        samples[b.task] = sorted(random.Random(f"{seed} {b.name}").sample(range(count), min(limit, count)))
    return samples


def _load(model: Any, adapter: str | Path | None, tokenizer: Any, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Load model and tokenizer if they are given by name. The tokenizer is copied: the harness sets its padding."""
    from ..adapters.chat_template import read_chat_template
    from ..adapters.loading import load_tokenizer
    from ..text.vocabulary import pad_token_id

    load = LoadOptions(trust_remote_code=trust_remote_code)
    if isinstance(model, str | Path):
        loaded, revision = _load_by_name(str(model), adapter, trust_remote_code)
    elif adapter is not None:
        raise LoraSuiteError("adapter needs a folder or Hub id as model", do="load the adapter on the model yourself")
    else:
        loaded, revision = model, None
    own = copy.deepcopy(load_tokenizer(loaded, tokenizer, revision, load))
    if isinstance(model, str | Path):
        own.chat_template = read_chat_template(_source(adapter or model, "adapter")) or own.chat_template
    if own.pad_token_id is not None:
        own.pad_token_id = pad_token_id(own, loaded.config.get_text_config().vocab_size)
    return loaded, own


def _load_by_name(model: str, adapter: str | Path | None, trust_remote_code: bool) -> tuple[Any, str | None]:
    """Load a model with its adapter, if there is one; also return the revision of the backbone."""
    from ..adapters.loading import adapter_folder, add_adapter, known_architecture, load_model
    from ..adapters.peft_format import CONFIG
    from ..adapters.reading import base_model_of

    base = _source(model, "model")
    adapter_source = None if adapter is None else _source(adapter, "adapter")
    if adapter_source is None and base.fetch(CONFIG) is not None:
        adapter_source = _source(model, "adapter")
        name, revision = base_model_of(base, do="pass model and adapter")
        base = Source(name, "model", revision, hub_only=base.folder is None)
    if adapter_source is None:
        return load_model(base, trust_remote_code=trust_remote_code), base.revision
    folder = adapter_folder(adapter_source)
    loaded = load_model(base, trust_remote_code=trust_remote_code)
    arch = functools.partial(known_architecture, base, trust_remote_code=trust_remote_code)
    return add_adapter(loaded, folder, adapter_source, base=base, arch=arch), base.revision


def _source(text: str | Path, kind: str) -> Source:
    name, revision = split_revision(text)
    return Source(name, kind, revision)


def run_harness(
    model: Any, tokenizer: Any, tasks: Mapping[str, Any], samples: dict[str, list[int]] | None,
    batch_size: int | str, chat: Mapping[str, Any],
) -> Mapping[str, Any]:  # fmt: skip
    from lm_eval.evaluator import evaluate as run
    from lm_eval.models.huggingface import HFLM

    if chat["apply_chat_template"] and not tokenizer.chat_template:
        raise LoraSuiteError(
            "the tokenizer has no chat template", where=_model_name(model), do="leave out apply_chat_template"
        )
    from .token_tables import checked_tables

    was_training = model.training
    try:
        harness_model: Any = HFLM  # its decorator hides the constructor's signature from the type checker
        task_dict: Any = {"tasks": tasks}
        with contiguous_head_input(model), checked_tables(model, tokenizer, _model_name(model)):
            wrapped = harness_model(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            # bootstrap_iters=0: the intervals are computed from the outcomes
            results = run(lm=wrapped, task_dict=task_dict, samples=samples, bootstrap_iters=0, **chat)
    finally:
        model.train(was_training)
    if results is None:
        raise LoraSuiteError("no results on this process", do="run the evaluation in a single process")
    return results


def _score_task(benchmark: Benchmark, logged: list[dict[str, Any]]) -> TaskScore:
    logged = sorted(logged, key=lambda sample: sample["doc_id"])
    items = tuple(_item_hash(sample["doc"]) for sample in logged)
    outcomes = tuple(float(sample["acc"]) for sample in logged)
    answered = [sample["answered"] for sample in logged if "answered" in sample]
    return TaskScore(benchmark.name, items, outcomes, sum(answered) / len(answered) if answered else None)


def _item_hash(item: Item) -> str:
    text = "\0".join((item["instruction"], item["input"], item["answer"]))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _model_name(model: Any) -> str:
    if isinstance(model, str | Path):
        return str(model)
    return getattr(model.config, "_name_or_path", "") or type(model).__name__
