"""Parsers of commands with many options: a brief help, and errors about a call on one line."""

from __future__ import annotations

import argparse
import itertools
import re
import sys
import textwrap
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from ..errors import printable

HANGING = re.compile(r" *\S+ {2,}|\s*")
"""Indentation of a line with its term, which the text behind the term is aligned with; else its indentation alone."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Wrap description and epilog at the terminal's width, line by line; lines without indentation are one text."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = re.sub(r"(?<=\S)\n(?=\S)", " ", text).splitlines()
        return "\n".join(_wrap(line, width) for line in lines)


def _wrap(line: str, width: int) -> str:
    found = HANGING.match(line)
    indent = " " * (found.end() if found else 0)
    return textwrap.fill(line, width, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)


class BriefParser(argparse.ArgumentParser):
    """A parser whose ``--help`` leaves out options once `show_only` was called.

    Options have to be spelled out: ``--to`` must not become ``--tokens`` where a command has no ``--to``.
    """

    _shown: tuple[str, ...] = ()

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Refuse an unknown option, with a similar one or what comes first; a command's parser would pass it on."""
        known = {name for action in self._actions for name in action.option_strings}
        words = itertools.takewhile("--".__ne__, sys.argv[1:] if args is None else args)
        names = [word.partition("=")[0] for word in words if re.match(r"--[a-z]", word)]
        unknown = [name for name in names if name not in known]
        if unknown and self._subparsers is None:  # the parser of all commands does not know their options
            close = get_close_matches(unknown[0], sorted(known), n=1, cutoff=0.75)
            places = " ".join(str(one.metavar or one.dest) for one in self._actions if not one.option_strings)
            hint = f": did you mean {close[0]}?" if close else f" (the call is `{self.prog} {places} [options]`)"
            self.error(f"unknown option {unknown[0]}{hint if close or places else ''}")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 and one line; the usage of a command can have more lines than a terminal."""
        see = " See" if message.endswith("?") else "; see"
        self.exit(2, f"{self.prog}: {printable(message)}{see} `{self.prog} --help`\n")

    def show_only(self, *options: str) -> None:
        """Show only these options, the required ones and the positional arguments; add ``--help-all``."""
        self._shown = ("-h", *options)
        self.add_argument("--help-all", action=_HelpAll, help="show all options and exit")

    def format_help(self) -> str:
        """Return the brief help, or all of it where nothing is left out."""
        if not self._shown:
            return super().format_help()
        helps = {action: action.help for action in self._actions}
        for action in self._actions:
            usual = not action.option_strings or action.required or {*action.option_strings} & {*self._shown}
            if not usual and not isinstance(action, _HelpAll):
                action.help = argparse.SUPPRESS
        try:
            return super().format_help()
        finally:
            for action, text in helps.items():
                action.help = text

    def format_full_help(self) -> str:
        """Return the help with all options."""
        return super().format_help()


class _HelpAll(argparse.Action):
    """Print all options and exit, as ``--help`` does."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Print and exit."""
        sys.stdout.write(parser.format_full_help())
        parser.exit()
