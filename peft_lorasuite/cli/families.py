"""The command ``families``: the supported model families, listed without importing torch."""

from __future__ import annotations

import textwrap
from argparse import Namespace
from typing import Any

from ..arch.registry import Family, families
from .common import Output, add_command

WIDTH = 80
LEGEND = """\
by part, by head, by group: order of the rows of a fused projection.
optional: depends on the config.
GQA: the config sets the number of key/value heads (MHA and MQA included)."""


def add(commands: Any) -> None:
    """Add the command."""
    add_command(commands, "families", "list the supported model families and their layers")


def run(args: Namespace) -> Output:
    """List the families."""
    found = families()
    rows = [{"model_type": model_type, **family._asdict()} for model_type, family in found.items()]
    return {"families": rows}, f"{_table(found)}\n\n{LEGEND}"


def _table(found: dict[str, Family]) -> str:
    """Format one line per model type; a line that is too long continues in the column of summaries."""
    lines = [("model type", "decoder layer")]
    lines += [(name, family.summary or f"(no summary; from {family.origin})") for name, family in found.items()]
    column = max(len(name) for name, _ in lines) + 2
    return "\n".join(
        textwrap.fill(f"{name:{column}}{text}", max(WIDTH, 2 * column), subsequent_indent=" " * column)
        for name, text in lines
    )
