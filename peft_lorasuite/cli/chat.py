"""``chat``: ask the base model, the upgraded adapter and the old pair the same, side by side."""

from __future__ import annotations

import shutil
import sys
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from ..errors import LoraSuiteError
from ..io.source import split_revision
from .common import Output, add_command, add_loading, load_options, positive, setup_logging


def add(commands: Any) -> None:
    """Add the command."""
    command = add_command(
        commands, "chat", "ask the bare backbone, the upgraded adapter and the old pair the same, side by side",
        "Without --prompt every line of the standard input is a question; the end of input ends it.",
    )  # fmt: skip
    command.add_argument("--base", required=True, metavar="NEW", help="new backbone")
    command.add_argument("--adapter", required=True, metavar="UPGRADED", help="the upgraded adapter")
    command.add_argument("--old", metavar="ADAPTER", help="the old adapter, for a third column")
    command.add_argument("--old-base", metavar="OLD", help="old backbone (default: the old adapter's config says)")
    command.add_argument("--prompt", metavar="TEXT", help="ask this one thing and stop")
    command.add_argument("--template", metavar="TEXT", help="prompt with {instruction} (default: the text as it is)")
    command.add_argument("--length", type=positive, default=128, help="tokens of an answer at most (default: 128)")
    add_loading(command)


def run(args: Namespace) -> Output:
    """Ask base, upgraded adapter and the old pair the same; once, or line by line from the standard input."""
    setup_logging(args)
    from ..models.backbone import Backbone
    from . import chat_session as session

    session.check_chat(args.template, args.length, args.prompt)
    adapter, revision = split_revision(args.adapter)
    old, old_revision = split_revision(args.old) if args.old else (None, None)
    bases = [
        None if text is None else Backbone.open(text, **load_options(args).model_kwargs())
        for text in (args.base, args.old_base)
    ]
    found = session.speakers(
        bases[0], adapter, revision=revision, old_base=bases[1], old_adapter=old, old_revision=old_revision,
        dtype=args.dtype, device_map=args.device_map,
    )  # fmt: skip
    turns: list[dict[str, Any]] = []
    for prompt in [args.prompt] if args.prompt is not None else _read_lines(shown=not (args.quiet or args.json)):
        answers = session.ask(found, prompt, template=args.template, length=args.length)
        turns.append({"prompt": prompt, "answers": answers})
        if not (args.quiet or args.json):
            width = shutil.get_terminal_size((100, 24)).columns
            sys.stdout.write(session.side_by_side(answers, width) + "\n")
            sys.stdout.flush()
    return {"turns": turns}, ""


def _read_lines(*, shown: bool) -> Iterator[str]:
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
