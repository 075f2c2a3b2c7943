"""``evaluate``: evaluate models and adapters on the benchmarks of the paper."""

from __future__ import annotations

import io
import logging
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from typing import Any

from ..errors import LoraSuiteError
from ..io.output import atomic_folder, check_output
from ..io.source import split_revision
from ..progress import Progress, no_progress
from .common import Output, add_command, add_labels, add_overwrite, positive, seed, setup_logging


def add(commands: Any) -> None:
    """Add the command."""
    command = add_command(
        commands, "evaluate", "evaluate a model and adapters on the benchmarks of the paper (lm-evaluation-harness)"
    )
    command.add_argument("model", metavar="MODEL_OR_ADAPTER", help="backbone, or an adapter (on its base model)")
    command.add_argument("--adapter", action="append", default=[], metavar="ADAPTER",
                         help="adapter on that backbone, compared with the backbone; may be repeated")  # fmt: skip
    command.add_argument("--against", nargs="+", default=[], metavar="OTHER",
                         help="other models, or adapters on their own base models, to compare with")  # fmt: skip
    command.add_argument("--published", metavar="PAIR",
                         help='add published results of a pair, such as "MiniCPM-S-1B -> MiniCPM-2B"')  # fmt: skip
    command.add_argument("--suite", default="commonsense", help="math, commonsense, or benchmarks separated by commas")
    command.add_argument("--data", metavar="PATH", help="folder with NAME_test.json files (default: from the Hub); for "
                         "classifiers, a file of texts with labels")  # fmt: skip
    command.add_argument("--limit", type=positive, metavar="N", help="maximum items per benchmark (default: all)")
    command.add_argument("--scoring", choices=("generate", "likelihood"), default="generate", help="default: generate")
    command.add_argument("--batch-size", type=positive, default=8, help="default: 8")
    command.add_argument("--template", metavar="TEXT", help="prompt with {instruction} (default: LLM-Adapters)")
    command.add_argument("--apply-chat-template", action="store_true", help="ask through the tokenizer's chat template")
    command.add_argument("--system-instruction", metavar="TEXT", help="system prompt")
    command.add_argument("--fewshot-as-multiturn", action="store_true", help="few-shot examples as turns")
    add_labels(command)
    command.add_argument("--seed", type=seed, default=0, help="random seed of --limit (default: 0)")
    command.add_argument("--trust-remote-code", action="store_true", help="let repositories run their own code")
    command.add_argument("-o", "--output", metavar="DIR", help="folder for the table and the scores as JSON")
    add_overwrite(command)


def run(args: Namespace) -> Output:
    """Evaluate a model and adapters, and compare each adapter with the model alone."""
    progress = setup_logging(args)
    if args.output:
        inputs = (args.model, *args.adapter, *args.against, args.data)
        check_output(args.output, overwrite=args.overwrite, inputs=inputs)
    first = args.model if args.against else "base"
    _check_distinct([first, *args.adapter, *args.against])
    if _is_classifier(args.adapter[0] if args.adapter else args.model):
        return _evaluate_classifiers(args, progress)
    from ..evaluation.harness import compare, comparison_table, evaluate, markdown_table, published_rows

    published = published_rows(args.published, args.suite) if args.published else None
    names = (
        "suite", "data", "limit", "scoring", "batch_size", "template", "apply_chat_template", "system_instruction",
        "fewshot_as_multiturn", "trust_remote_code", "seed",
    )  # fmt: skip
    settings = {name: getattr(args, name) for name in names}
    jobs = {first: (args.model, None), **{name: (args.model, name) for name in args.adapter}}
    jobs |= {name: (name, None) for name in args.against}
    with silence_harness() if progress is no_progress else nullcontext():
        rows = {
            label: evaluate(model, adapter=adapter, **settings)
            for label, (model, adapter) in progress("evaluating", list(jobs.items()))
        }
    texts = [markdown_table(rows, published=published)]
    pairs = [(name, first) for name in args.adapter] + [(first, name) for name in args.against]
    for one, other in pairs:
        texts.append(f"{one} against {other}:\n\n{comparison_table(compare(rows[one], rows[other]))}")
    text = "\n".join(texts)
    return _output(args, rows, text)


def _is_classifier(name: str) -> bool:
    """Return whether a name is that of an adapter with a classification head."""
    from ..adapters.peft_format import CONFIG
    from ..adapters.reading import read_config
    from ..io.source import Source
    from ..models.task import CLASSIFIERS

    repo, revision = split_revision(name)
    source = Source(repo, "adapter", revision)
    return source.fetch(CONFIG) is not None and read_config(source).get("task_type") in CLASSIFIERS


def _evaluate_classifiers(args: Namespace, progress: Progress) -> Output:
    """Evaluate classifiers on texts with labels: the adapters on ``model``, or ``model`` and ``--against``."""
    from ..evaluation.classification import evaluate_classifier

    if not args.data:
        raise LoraSuiteError("a classifier is evaluated on texts with labels", got="no --data", do="pass --data FILE")
    names = args.adapter or [args.model, *args.against]
    rows = {}
    for name in names:
        adapter, revision = split_revision(name)
        rows[name] = evaluate_classifier(
            adapter, args.data, base=args.model if args.adapter else None, labels=args.labels, revision=revision,
            problem_type=args.problem_type, template=args.template, limit=args.limit,
            trust_remote_code=args.trust_remote_code, seed=args.seed, progress=progress,
        )  # fmt: skip
    text = "\n".join(f"{name}: {row.table()}" for name, row in rows.items())
    return _output(args, rows, text)


def _output(args: Namespace, rows: Mapping[str, Any], text: str) -> Output:
    """Return what the command prints; also write it if there is an output folder."""
    values: dict[str, Any] = {"rows": {name: row.to_dict() for name, row in rows.items()}}
    if args.output:
        with atomic_folder(args.output, overwrite=args.overwrite) as part:
            for number, row in enumerate(rows.values()):
                row.save(part / f"{number}.json")
            (part / "table.md").write_text(text, encoding="utf-8")
        values["output"] = args.output
    return values, text


def _check_distinct(labels: Sequence[str]) -> None:
    """Check that no two rows of the table have the same label."""
    duplicates = sorted({label for label in labels if labels.count(label) > 1})
    if duplicates:
        raise LoraSuiteError(
            "two rows would have the same name", got=", ".join(duplicates), wanted="every model and adapter once",
            do="leave one out, or write it another way (an adapter in a folder called base as ./base)",
        )  # fmt: skip


@contextmanager
def silence_harness() -> Iterator[None]:
    """Suppress the harness's progress bars and messages, for which it has no option."""
    harness = logging.getLogger("lm_eval")
    before = harness.level
    harness.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        harness.setLevel(before)
