"""``inspect``: an HTML report of a map or an upgraded adapter."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from ..io.source import split_revision
from .common import Output, add_command, add_overwrite, setup_logging


def add(commands: Any) -> None:
    """Add the command."""
    command = add_command(
        commands, "inspect", "write a report with pictures of a map or an upgraded adapter, as one HTML file"
    )
    command.add_argument("name", metavar="MAP_OR_ADAPTER", help="what `map` or `upgrade` wrote")
    command.add_argument("-o", "--output", required=True, metavar="FILE", help="the HTML file")
    add_overwrite(command, "file if it exists")
    command.add_argument("--rows", metavar="DIR", help="measured rows, as evaluate -o DIR writes them: the gap's bars")
    command.add_argument("--map", metavar="DIR", help="for an adapter: the map that it was made with")
    command.add_argument("--old-adapter", metavar="ADAPTER", help="for an adapter: the one that it was made of")
    command.add_argument("--from", dest="old", metavar="OLD",
                         help="for an adapter: its old backbone (default: the old adapter's config says)")  # fmt: skip
    command.add_argument("--to", dest="new", metavar="NEW",
                         help="for an adapter: the new backbone (default: the adapter's config says)")  # fmt: skip


def run(args: Namespace) -> Output:
    """Write a report of a map or an adapter."""
    setup_logging(args)
    from ..reporting.inspect import inspect

    name, revision = split_revision(args.name)
    drawn = inspect(
        name, args.output, revision=revision, upgrade_map=args.map, old_adapter=args.old_adapter,
        old=args.old, new=args.new, rows=args.rows, overwrite=args.overwrite,
    )  # fmt: skip
    values = {"output": str(args.output), "figures": drawn.figures, "missing": drawn.missing}
    lines = [f"wrote {args.output}: {len(drawn.figures)} figures ({', '.join(drawn.figures)})"]
    lines += [f"  not shown: {name}: {reason}" for name, reason in drawn.missing.items()]
    return values, "\n".join(lines)
