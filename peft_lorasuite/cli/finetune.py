"""``finetune``: light fine-tuning of an adapter on labeled samples."""

from __future__ import annotations

import time
from argparse import Namespace
from typing import Any

from ..io.output import check_output
from ..io.source import split_revision
from .common import (
    DATA,
    Output,
    add_chat,
    add_command,
    add_labels,
    add_loading,
    add_output,
    add_training,
    chat_options,
    seed,
    setup_logging,
    training_options,
)


def add(commands: Any) -> None:
    """Add the command."""
    command = add_command(commands, "finetune", "fine-tune an adapter on a few labeled samples")
    command.add_argument("adapter", metavar="ADAPTER", help="the adapter")
    command.add_argument("--data", required=True, metavar="DATA", help=DATA)
    command.add_argument("--base", metavar="MODEL", help="backbone (default: the adapter's base model)")
    command.add_argument("--seed", type=seed, default=0, help="random seed (default: 0)")
    add_labels(command)
    add_chat(command, old=False)
    add_training(command)
    add_output(command, "the fine-tuned adapter")
    add_loading(command)


def run(args: Namespace) -> Output:
    """Fine-tune and write."""
    progress = setup_logging(args)
    check_output(args.output, overwrite=args.overwrite, inputs=(args.adapter, args.base, args.data))
    from ..training.finetune import finetune

    start = time.perf_counter()
    name, revision = split_revision(args.adapter)
    trained = finetune(
        name, args.data, chat=chat_options(args), base=args.base, labels=args.labels, problem_type=args.problem_type,
        revision=revision, trust_remote_code=args.trust_remote_code, dtype=args.dtype, device_map=args.device_map,
        output=args.output, overwrite=args.overwrite, progress=progress, **training_options(args),
    )  # fmt: skip
    seconds, record = round(time.perf_counter() - start, 2), trained.finetune_record
    values = {"output": str(args.output), "training": record, "seconds": seconds}
    return values, f"wrote {args.output}: trained on {record['used']} samples, loss {record['loss']:.3f} ({seconds} s)"
