"""Help of commands with many options: the usual ones with ``--help``, all of them with ``--help-all``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any


class BriefParser(argparse.ArgumentParser):
    """A parser whose ``--help`` leaves out options once `show_only` was called."""

    _shown: tuple[str, ...] = ()

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
