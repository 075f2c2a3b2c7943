"""``inspect``: an HTML report of a map or an upgraded adapter."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from ..io.source import split_revision
from .common import Output, add_command, add_overwrite, setup_logging


def add(commands: Any) -> None:
    """Add the command."""
    command = add_command(
        commands, "inspect", "write a report of a map or an upgraded adapter, with figures, as one HTML file"
    )
    command.add_argument("name", metavar="MAP_OR_ADAPTER", help="folder written by `map` or `upgrade`")
    command.add_argument("-o", "--output", required=True, metavar="FILE", help="the HTML file")
    add_overwrite(command, "file if it exists")
    command.add_argument("--rows", metavar="DIR", help="measured results (of evaluate -o), for the gap recovered")
    command.add_argument("--map", metavar="DIR", help="for an adapter: the map that was used")
    command.add_argument("--old-adapter", metavar="ADAPTER", help="for an adapter: the old adapter")
    command.add_argument("--from", dest="old", metavar="OLD",
                         help="for an adapter: the old backbone (default: the old adapter's base model)")  # fmt: skip
    command.add_argument("--to", dest="new", metavar="NEW",
                         help="for an adapter: the new backbone (default: the adapter's base model)")  # fmt: skip


def run(args: Namespace) -> Output:
    """Write a report of a map or an adapter."""
    setup_logging(args)
    from ..reporting.inspect import inspect

    name, revision = split_revision(args.name)
    contents = inspect(
        name, args.output, revision=revision, upgrade_map=args.map, old_adapter=args.old_adapter,
        old=args.old, new=args.new, rows=args.rows, overwrite=args.overwrite,
    )  # fmt: skip
    values = {"output": str(args.output), "figures": contents.figures, "missing": contents.missing}
    figures = f": {len(contents.figures)} figures ({', '.join(contents.figures)})" if contents.figures else ""
    lines = [f"wrote {args.output}{figures}"]
    lines += [f"  not shown: {what}: {reason}" for what, reason in contents.missing.items()]
    return values, "\n".join(lines)
