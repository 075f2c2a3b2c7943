"""What studies of `transplant` share that read both models themselves: their arguments, and the development items."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import load_task

from peft_lorasuite import Backbone, UpgradeMap
from peft_lorasuite.adapters.adapter import read as read_adapter
from peft_lorasuite.io.source import Source
from peft_lorasuite.methods.base import Job
from peft_lorasuite.methods.behavior.positions import tokens
from peft_lorasuite.methods.behavior.probe import Reading, ReadingOptions, read
from peft_lorasuite.models.generation import Turn
from peft_lorasuite.progress import bars
from peft_lorasuite.text.examples import fill


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of the pair, the adapter, the task and how many development items are read."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("old", "new", "adapter"):
        parser.add_argument(f"--{name}", required=True, help="folder or Hub id")
    parser.add_argument("--map", required=True, help="folder of the pair's upgrade map")
    parser.add_argument("--task", required=True, choices=("arc", "facts", "math"))
    parser.add_argument("--data", required=True, type=Path, help="folder with the LLM-Adapters files")
    parser.add_argument("--items", type=int, default=40, help="development items")
    parser.add_argument("--dtype", default="auto", help="of the models")
    return parser


def opened(args: argparse.Namespace) -> Job:
    """Return the job that the arguments describe, with the task's prompts."""
    old, new = (Backbone.open(name, dtype=args.dtype) for name in (args.old, args.new))
    adapter = read_adapter(Source(args.adapter, "adapter"), old.arch)
    prompts = load_task(args.task, args.data, 1).prompts
    return Job(adapter, UpgradeMap.load(args.map), old, new, prompts, progress=bars)


def read_items(job: Job, args: argparse.Namespace, options: ReadingOptions) -> tuple[Reading, torch.Tensor]:
    """Read the development items with their reference answers; also the new token that follows each place."""
    _, new = job.backbones("transplant")
    turns = [Turn(fill(one), one.output, True) for one in load_task(args.task, args.data, 1).dev[: args.items]]
    reading = read(job, options, turns)
    ended = [(*tokens(new, turn).ids, new.tokenizer.eos_token_id) for turn in turns]
    return reading, torch.tensor([ended[turn][position + 1] for turn, _, position in reading.places])
