"""``chat``: ask the new backbone, the upgraded adapter and the old adapter the same question."""

from __future__ import annotations

import shutil
import sys
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from ..errors import LoraSuiteError
from ..io.source import split_revision
from .common import (
    Output,
    add_chat,
    add_command,
    add_loading,
    chat_options,
    load_options,
    positive,
    setup_logging,
)


def add(commands: Any) -> None:
    """Add the command."""
    command = add_command(
        commands, "chat", "ask the new backbone, the upgraded adapter and the old adapter the same question",
        "Without --prompt every line of the standard input is a question, until the end of the input. A model with a\n"
        "chat template gets the conversation so far.",
    )  # fmt: skip
    command.add_argument("--base", metavar="NEW", help="new backbone (default: the adapter's base model)")
    command.add_argument("--adapter", required=True, metavar="UPGRADED", help="the upgraded adapter")
    command.add_argument("--old", metavar="ADAPTER", help="the old adapter, for a third column of answers")
    command.add_argument("--old-base", metavar="OLD", help="old backbone (default: the old adapter's base model)")
    command.add_argument("--prompt", metavar="TEXT", help="ask this question only")
    command.add_argument("--template", metavar="TEXT", help="prompt with {instruction}, instead of a chat template")
    command.add_argument("--length", type=positive, default=128, help="maximum tokens of an answer (default: 128)")
    add_chat(command, old=True)
    add_loading(command)


def run(args: Namespace) -> Output:
    """Ask the question of --prompt, or one per line of the standard input."""
    setup_logging(args)
    from . import chat_session

    chat = chat_options(args)
    chat_session.check_chat(args.template, args.length, args.prompt)
    adapter, revision = split_revision(args.adapter)
    old, old_revision = split_revision(args.old) if args.old else (None, None)
    models = chat_session.load_models(
        args.base, adapter, revision=revision, old_base=args.old_base, old_adapter=old, old_revision=old_revision,
        dtype=args.dtype, device_map=args.device_map, chat=chat, access=load_options(args).model_kwargs(),
    )  # fmt: skip
    turns: list[dict[str, Any]] = []
    for prompt in [args.prompt] if args.prompt is not None else _read_lines(shown=not (args.quiet or args.json)):
        answers = chat_session.ask(models, prompt, template=args.template, length=args.length)
        turns.append({"prompt": prompt, "answers": answers})
        if not (args.quiet or args.json):
            width = shutil.get_terminal_size((100, 24)).columns
            sys.stdout.write(chat_session.format_columns(answers, width) + "\n")
            sys.stdout.flush()
    return {"turns": turns}, ""


def _read_lines(*, shown: bool) -> Iterator[str]:
    """Yield the non-empty lines of the standard input; at a terminal, with a prompt for each."""
    interactive = shown and sys.stdin.isatty()
    while True:
        if interactive:
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
