"""The command line ``peft-lorasuite``: one module per command, each with `add` (arguments) and `run`."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Sequence
from types import ModuleType

from .._version import __version__
from ..errors import LoraSuiteError, printable, unknown_name_error
from ..models.distributed import is_main_process
from ..progress import lenient_stderr
from . import chat, check, demo, evaluate, export, families, finetune, inspect, map, upgrade
from .brief_help import BriefParser, HelpFormatter
from .common import NAME

WAIT = 5
"""Seconds that other processes than the first wait before they print an error: where the first fails for the same
reason, the launcher ends them, so that the error is printed once."""
COMMANDS: dict[str, ModuleType] = {
    "map": map, "upgrade": upgrade, "distill": upgrade, "finetune": finetune, "evaluate": evaluate,
    "inspect": inspect, "chat": chat, "export": export, "check": check, "families": families, "demo": demo,
}  # fmt: skip
HEAD = """Transfer a LoRA adapter to an upgraded backbone.

Backbones, adapters and maps are folders or Hub ids; ID@REVISION selects a branch, tag or commit."""
TAIL = f"""examples:
  {NAME} upgrade me/old-lora --to new/backbone --prompts prompts.jsonl -o new-lora
      The old backbone is the adapter's base model; the upgrade map is built once and cached.
  {NAME} upgrade me/old-lora --to new/backbone --finetune train.json --samples 100 -o new-lora
      The same, then light fine-tuning on 100 labeled samples.
  {NAME} map old/backbone new/backbone -o map
  {NAME} upgrade me/old-lora --to new/backbone --map map -o new-lora
      The map once, for any number of adapters.
  {NAME} upgrade me/old-lora --to new/backbone --for vllm -o new-lora
      In the form that the program loads whole; `check new-lora --for vllm` says what it would refuse or drop.
  {NAME} check new-lora --old me/old-lora --data test.json
      Whether the new adapter can replace the old one, measured: one page, and exit code 1 if not.
  {NAME} inspect new-lora -o report.html
      What was transferred, and whether it is likely to hold, with figures.
  {NAME} demo
      All of it on a small pair that comes with the package.

The result is a plain PEFT folder: PeftModel.from_pretrained(model, "new-lora") loads it, without this package.
`{NAME} COMMAND --help` has the details. Exit code: 0 if the result was written or the check passed, 1 for an error or a
check that did not pass, 2 for a wrong call."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that a terminal cannot show must not fail
    with lenient_stderr():
        return _run(_parse(list(sys.argv[1:] if argv is None else argv)))


def _parse(words: list[str]) -> argparse.Namespace:
    """Parse the arguments; none at all print the help, and an unknown command gets the nearest name."""
    parser = _parser()
    if not words:
        parser.print_help()
        parser.exit()
    if not words[0].startswith("-") and words[0] not in COMMANDS:
        parser.error(str(unknown_name_error("command", words[0], COMMANDS)))
    return parser.parse_args(words)


def _run(args: argparse.Namespace) -> int:
    try:
        values, text = COMMANDS[args.command].run(args)
    except LoraSuiteError as error:
        if not is_main_process():
            time.sleep(WAIT)
        print(f"{NAME}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stopped:
        print(f"{NAME}: interrupted, {stopped or 'nothing was written'}", file=sys.stderr)
        return 130
    if not is_main_process():
        return 0
    if args.json:
        encodable = (sys.stdout.encoding or "").lower().startswith("utf")
        text = json.dumps(values, ensure_ascii=not encodable)
    elif args.quiet:
        text = ""
    failed = _print(printable(text, keep="\n"), required=args.json or "output" not in values)
    return failed or int(values.get("passed") is False)


def _print(text: str, *, required: bool) -> int:
    """Print the result of a command; return the exit code. The text about a written output may be lost."""
    try:
        if text:
            print(text, flush=True)
    except OSError as error:  # a closed pipe, a full disk
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python fails again when it exits
        if required:
            print(f"{NAME}: the result cannot be printed: {error.strerror}", file=sys.stderr)
            return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = BriefParser(prog=NAME, description=HEAD, epilog=TAIL, formatter_class=HelpFormatter)
    parser.add_argument("--version", action="version", version=f"{NAME} {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in dict.fromkeys(COMMANDS.values()):
        module.add(commands)
    return parser
