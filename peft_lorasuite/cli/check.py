"""``check``: what a program will refuse or drop of an adapter, before it is deployed."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from ..io.source import split_revision
from .common import Output, add_command, add_engine, setup_logging


def add(commands: Any) -> None:
    """Add the command."""
    command = add_command(
        commands, "check", "say what a serving engine will refuse or drop of an adapter",
        "Exit code 1 if it refuses or drops anything; `export ADAPTER --for ENGINE` converts what can be converted.",
    )  # fmt: skip
    command.add_argument("adapter", metavar="ADAPTER", help="a PEFT adapter, or one written by `export`")
    add_engine(command, required=True, what="the program that will load it")
    command.add_argument("--base", metavar="MODEL", help="backbone (default: the adapter's base model)")
    command.add_argument("--adapter-name", metavar="NAME", help="name of the adapter, if the folder has several")


def run(args: Namespace) -> Output:
    """Check an adapter by its files."""
    setup_logging(args)
    from ..serving.checking import check

    name, revision = split_revision(args.adapter)
    checked = check(name, engine=args.engine, base=args.base, adapter_name=args.adapter_name, revision=revision)
    return checked.to_dict(), str(checked)
