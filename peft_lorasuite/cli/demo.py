"""``demo``: upgrade and fine-tune an adapter on the pair of models in the package."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from ..io.output import check_output
from .common import Output, add_command, add_overwrite, positive, setup_logging


def add(commands: Any) -> None:
    """Add the command."""
    command = add_command(
        commands, "demo", "upgrade and fine-tune an adapter on the small pair of models in the package",
        "The models, the adapter and its data are folders to try other commands on: peft_lorasuite/data/demo has old, "
        "new,\nadapter, prompts.json and test.json.",
    )  # fmt: skip
    command.add_argument("-o", "--output", default="demo-result", metavar="DIR",
                         help="folder for adapters, table and figure (default: demo-result)")  # fmt: skip
    add_overwrite(command)
    command.add_argument("--samples", type=positive, default=100, help="labeled samples (default: 100)")


def run(args: Namespace) -> Output:
    """Run the demo."""
    progress = setup_logging(args)
    check_output(args.output, overwrite=args.overwrite)
    from .demo_steps import run_demo

    result = run_demo(args.output, samples=args.samples, overwrite=args.overwrite, progress=progress)
    return {"output": str(args.output), **result.to_dict()}, f"{result.table()}\nwrote {args.output}"
