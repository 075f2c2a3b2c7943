"""What the commands that look at results do: evaluate, inspect, chat, demo; each like those in `commands`."""

from __future__ import annotations

import io
import logging
import shutil
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from typing import Any

from ..errors import LoraSuiteError
from ..io.output import check_free, whole_folder
from ..io.source import name_and_revision
from ..progress import silent
from .calls import Told, begin, open_backbone


def evaluate(args: Namespace) -> Told:
    """Measure a model, and adapters on it, and compare each adapter with the bare model."""
    progress = begin(args)
    if args.output:
        given = (args.model, *args.adapter, *args.against, args.data)
        check_free(args.output, overwrite=args.overwrite, inputs=given)
    from ..evaluation.harness import compare, comparison_table, markdown_table, published_rows
    from ..evaluation.harness import evaluate as measure

    beside = published_rows(args.published, args.suite) if args.published else None  # refused before the work
    names = ("suite", "data", "limit", "scoring", "batch_size", "template", "seed")
    settings = {name: getattr(args, name) for name in names}
    first = args.model if args.against else "base"
    _check_distinct([first, *args.adapter, *args.against])
    wanted = {first: (args.model, None), **{name: (args.model, name) for name in args.adapter}}
    wanted |= {name: (name, None) for name in args.against}
    with _hushed() if progress is silent else nullcontext():
        rows = {
            label: measure(model, adapter=adapter, **settings)
            for label, (model, adapter) in progress("evaluating", list(wanted.items()))
        }
    texts = [markdown_table(rows, published=beside)]
    pairs = [(name, first) for name in args.adapter] + [(first, name) for name in args.against]
    for one, other in pairs:
        texts.append(f"{one} against {other}:\n\n{comparison_table(compare(rows[one], rows[other]))}")
    text = "\n".join(texts)
    told = {"rows": {label: row.to_dict() for label, row in rows.items()}}
    if args.output:
        with whole_folder(args.output, overwrite=args.overwrite) as part:
            for number, row in enumerate(rows.values()):
                row.save(part / f"{number}.json")
            (part / "table.md").write_text(text, encoding="utf-8")
        told["output"] = args.output
    return told, text


def _check_distinct(labels: Sequence[str]) -> None:
    """Refuse rows that would take each other's place, before the work."""
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise LoraSuiteError(
            "two rows would have the same name", got=", ".join(twice), wanted="every model and adapter once",
            do="leave one out, or write it another way (an adapter in a folder called base as ./base)",
        )  # fmt: skip


@contextmanager
def _hushed() -> Iterator[None]:
    """Keep the harness from showing bars and notes, for which it has no switch."""
    harness = logging.getLogger("lm_eval")
    before = harness.level
    harness.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        harness.setLevel(before)


def demo(args: Namespace) -> Told:
    """Run the demo."""
    progress = begin(args)
    check_free(args.output, overwrite=args.overwrite)
    from .demo import run

    result = run(args.output, samples=args.samples, overwrite=args.overwrite, progress=progress)
    return {"output": str(args.output), **result.to_dict()}, f"{result.table()}\nwrote {args.output}"


def inspect(args: Namespace) -> Told:
    """Write a report of a map or an adapter."""
    begin(args)
    from ..reporting.inspect import inspect as look

    name, revision = name_and_revision(args.name)
    drawn = look(
        name, args.output, revision=revision, upgrade_map=args.map, old_adapter=args.old_adapter,
        old=args.old, new=args.new, rows=args.rows, overwrite=args.overwrite,
    )  # fmt: skip
    told = {"output": str(args.output), "figures": drawn.figures, "missing": drawn.missing}
    lines = [f"wrote {args.output}: {len(drawn.figures)} figures ({', '.join(drawn.figures)})"]
    lines += [f"  not shown: {name}: {reason}" for name, reason in drawn.missing.items()]
    return told, "\n".join(lines)


def chat(args: Namespace) -> Told:
    """Ask base, upgraded adapter and the old pair the same; once, or line by line from the standard input."""
    begin(args)
    from ..models.backbone import Backbone
    from . import chat as talk

    talk.check_chat(args.template, args.length, args.prompt)
    adapter, revision = name_and_revision(args.adapter)
    old, old_revision = name_and_revision(args.old) if args.old else (None, None)
    bases = [None if text is None else open_backbone(Backbone, text, args) for text in (args.base, args.old_base)]
    found = talk.speakers(
        bases[0], adapter, revision=revision, old_base=bases[1], old_adapter=old, old_revision=old_revision,
        dtype=args.dtype, device_map=args.device_map,
    )  # fmt: skip
    turns: list[dict[str, Any]] = []
    for prompt in [args.prompt] if args.prompt is not None else _typed(shown=not (args.quiet or args.json)):
        answers = talk.ask(found, prompt, template=args.template, length=args.length)
        turns.append({"prompt": prompt, "answers": answers})
        if not (args.quiet or args.json):
            width = shutil.get_terminal_size((100, 24)).columns
            sys.stdout.write(talk.side_by_side(answers, width) + "\n")
            sys.stdout.flush()
    return {"turns": turns}, ""


def _typed(*, shown: bool) -> Iterator[str]:
    """Give the lines of the standard input that say something; at a terminal, ask for each until the end of input."""
    asked = shown and sys.stdin.isatty()
    while True:
        if asked:
            sys.stdout.write("\n> ")
            sys.stdout.flush()
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise LoraSuiteError(f"the standard input cannot be read: {error}", wanted="text in UTF-8") from error
        if not line:
            return
        if line.strip():
            yield line.strip()
