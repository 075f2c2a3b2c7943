"""What the programs in ``hub_scripts`` share: their parser, logging, and errors on one line."""

from __future__ import annotations

import logging
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable

from ..errors import LoraSuiteError
from ..progress import lenient_stderr
from .brief_help import BriefParser, HelpFormatter
from .common import PROMPTS, add_chat, non_empty


def script_parser(name: str, description: str | None) -> ArgumentParser:
    """Return a parser with the options of every program that pushes."""
    parser = BriefParser(prog=f"{name}.py", description=description, formatter_class=HelpFormatter)
    parser.register("type", None, non_empty)
    parser.add_argument("--private", action="store_true", help="create a private repository; refuse a public one")
    parser.add_argument("--overwrite", action="store_true", help="replace other content of the repository")
    return parser


def add_pair(parser: ArgumentParser, *, old: str, required: bool = False) -> None:
    """Add the options of an upgrade: backbones, map, method and prompts; ``old`` is the help of ``--from``."""
    parser.add_argument("--from", dest="old", required=required, metavar="OLD", help=old)
    parser.add_argument("--to", required=True, metavar="NEW", help="new backbone")
    parser.add_argument("--map", metavar="MAP", help="upgrade map: Hub id or folder (default: cached or built)")
    parser.add_argument("--method", default="auto", help="see `peft-lorasuite upgrade --help` (default: auto)")
    parser.add_argument(
        "--prompts", metavar="FILE", help=f"unlabeled prompts, for methods that run the models: {PROMPTS}"
    )
    add_chat(parser, old=True, formats=True)


def run_script(name: str, run: Callable[[Namespace], int], args: Namespace) -> int:
    """Run a program; return its exit code, 1 for an error."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("peft_lorasuite").setLevel(logging.INFO)
    with lenient_stderr():
        try:
            return run(args)
        except LoraSuiteError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 1
