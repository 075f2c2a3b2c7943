"""``check``: what a program will refuse or drop of an adapter, and whether an upgraded one can replace the old one."""

from __future__ import annotations

import argparse
import logging
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ..errors import LoraSuiteError
from ..io.source import split_revision
from ..progress import no_progress
from .common import (
    DATA,
    Output,
    add_chat,
    add_command,
    add_engine,
    add_loading,
    chat_options,
    load_options,
    names,
    pair,
    positive,
    seed,
    setup_logging,
)

USUAL = ("--for", "--old", "--data", "--suite", "--refusals", "--require", "-o")
"""Options of the brief help."""
ALONE = ("data", "suite", "refusals", "retrained", "require", "output", "old_base")
"""Options that need ``--old``."""

log = logging.getLogger(__name__)


def add(commands: Any) -> None:
    """Add the command."""
    command = add_command(
        commands, "check", "check an adapter before it is deployed: against the old one, for a serving engine",
        "With --for it reports, from the files alone, what the engine would refuse or drop; `export ADAPTER --for\n"
        "ENGINE` converts what can be converted. With --old both adapters are run, and a page of figures (check.md,\n"
        "check.json) is written beside the adapter. Exit code 1 if the check does not pass.",
    )  # fmt: skip
    command.add_argument("adapter", metavar="ADAPTER", help="a PEFT adapter, or one written by `upgrade` or `export`")
    add_engine(command, required=False, what="the program that will load it")
    command.add_argument("--old", metavar="OLD_ADAPTER", help="the adapter that it was upgraded from")
    command.add_argument("--data", metavar="FILE", help="prompts of the task, all of them with reference "
                         f"answers or none: {DATA}; a .txt file has one prompt per line; or self, or built-in "
                         "(default: chosen among these two)")  # fmt: skip
    command.add_argument("--suite", type=names, metavar="A,B,...",
                         help="tasks of lm-evaluation-harness on which the new backbone must not lose")  # fmt: skip
    command.add_argument("--refusals", metavar="FILE", help="prompts that should be refused")
    command.add_argument("--retrained", metavar="ADAPTER", help="an adapter retrained on the new backbone, to compare")
    command.add_argument("--require", action="append", default=[], type=_requirement, metavar="NAME=VALUE",
                         help="a threshold, such as gap=0.9; may be repeated")  # fmt: skip
    command.add_argument("-o", "--output", metavar="DIR", help="folder for the page (default: that of the adapter)")
    command.add_argument("--base", metavar="MODEL", help="backbone (default: the adapter's base model)")
    command.add_argument("--from", dest="old_base", metavar="OLD",
                         help="the old backbone (default: the old adapter's base model)")  # fmt: skip
    command.add_argument("--adapter-name", metavar="NAME", help="name of the adapter, if the folder has several")
    command.add_argument("--limit", type=positive, default=200, metavar="N", help="prompts at most (default: 200)")
    command.add_argument("--length", type=positive, default=128, metavar="N",
                         help="tokens of an answer at most (default: 128)")  # fmt: skip
    command.add_argument("--seed", type=seed, default=0, help="random seed (default: 0)")
    add_chat(command, old=True, formats=True)
    add_loading(command)
    command.show_only(*USUAL)
    command.set_defaults(wrong_call=command.error)


def run(args: Namespace) -> Output:
    """Check an adapter by its files, or against the old one."""
    if not (args.engine or args.old):
        args.wrong_call("one of the arguments --for --old is required")
    if not args.old and (given := [name for name in ALONE if getattr(args, name)]):
        args.wrong_call(f"--{given[0].replace('old_base', 'from')} needs --old")
    progress = setup_logging(args)
    if args.old:
        return _check_upgrade(args, progress)
    from ..serving.checking import check

    name, revision = split_revision(args.adapter)
    checked = check(name, engine=args.engine, base=args.base, adapter_name=args.adapter_name, revision=revision)
    return checked.to_dict(), str(checked)


def _check_upgrade(args: Namespace, progress: Any) -> Output:
    from ..checking.upgrade_check import check_upgrade
    from .evaluate import silence_harness

    load = load_options(args)
    with silence_harness() if args.suite and progress is no_progress else nullcontext():
        checked = check_upgrade(
            args.adapter, old=args.old, base=args.base, old_base=args.old_base, data=args.data, suite=args.suite or (),
            refusals=args.refusals, retrained=args.retrained, engine=args.engine, require=dict(args.require),
            chat=chat_options(args), limit=args.limit, length=args.length, adapter_name=args.adapter_name,
            trust_remote_code=load.trust_remote_code, dtype=load.dtype, device_map=load.device_map, seed=args.seed,
            progress=progress,
        )  # fmt: skip
    values, text = checked.to_dict(), str(checked)
    if args.output:
        values["output"] = str(checked.save(args.output))
    elif (folder := Path(args.adapter).expanduser()).is_dir():
        inner = folder / (args.adapter_name or "")
        folder = inner if inner.is_dir() else folder
        try:
            values["output"] = str(checked.save(folder))
        except LoraSuiteError as error:  # nobody asked for it
            log.warning("the page is not written: %s", error)
    return values, f"{text}\nwrote {values['output']}/check.md" if "output" in values else text


def _requirement(text: str) -> tuple[str, float]:
    """Parse NAME=VALUE of a threshold."""
    from ..checking.thresholds import read_thresholds

    name, value = pair(text)
    try:
        return name, read_thresholds({name: value})[name]
    except LoraSuiteError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
