"""``export``: write an adapter in the form that a program loads whole."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from ..io.output import check_output
from ..io.source import split_revision
from .common import Output, add_command, add_engine, add_output, add_written_form, positive, setup_logging


def add(commands: Any) -> None:
    """Add the command."""
    command = add_command(
        commands, "export", "write an adapter in the form that a serving engine loads whole",
        "The result is a plain LoRA of one rank. Modules without an update get a pair that adds nothing where the\n"
        "engine needs it. It is checked as `check` does; if anything would be refused or dropped, nothing is written.",
    )  # fmt: skip
    command.add_argument("adapter", metavar="ADAPTER", help="a PEFT adapter")
    add_engine(command, required=True, what="the program that will load it")
    command.add_argument("--base", metavar="MODEL", help="backbone (default: the adapter's base model)")
    command.add_argument("--adapter-name", metavar="NAME", help="name of the adapter, if the folder has several")
    command.add_argument("--rank", type=positive, metavar="R",
                         help="rank of the result (default: the largest that a module needs)")  # fmt: skip
    add_written_form(command)
    add_output(command, "the exported adapter")


def run(args: Namespace) -> Output:
    """Convert, check and write."""
    setup_logging(args)
    check_output(args.output, overwrite=args.overwrite, inputs=(args.adapter, args.base))
    from ..serving.exporting import export

    name, revision = split_revision(args.adapter)
    checked = export(
        name, args.output, engine=args.engine, base=args.base, base_model=args.base_model, rank=args.rank,
        dtype=args.save_dtype, overwrite=args.overwrite, adapter_name=args.adapter_name, revision=revision,
    )  # fmt: skip
    return {"output": str(args.output), "check": checked.to_dict()}, f"wrote {args.output}\n{checked}"
