"""The command line ``peft-lorasuite``: what there is to say; the work is in `commands`, imported when it is wanted."""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from .._version import __version__
from ..errors import LoraSuiteError
from ..models.distributed import is_first
from . import arguments as take

PATIENCE = 5
"""Seconds that another process than the first waits before it tells an error: the launcher ends it if the first fails
for the same reason, so that it is told once."""
NAME = "peft-lorasuite"
HEAD = """Carry a LoRA adapter over to the upgraded backbone.

Backbones, adapters and maps are folders or Hub ids; ID@REVISION names a branch, tag or commit."""
TAIL = f"""examples:
  {NAME} upgrade me/old-lora --to new/backbone -o new-lora
      The old backbone is the one that the adapter's config names; the upgrade map is built once and kept.
  {NAME} upgrade me/old-lora --to new/backbone --finetune train.json --samples 100 -o new-lora
      The same, then light fine-tuning on 100 labelled samples.
  {NAME} map old/backbone new/backbone -o map
  {NAME} upgrade me/old-lora --to new/backbone --map map -o new-lora
      The map once, for any number of adapters.
  {NAME} inspect new-lora -o report.html
      What was carried, and whether it is likely to hold, with pictures.
  {NAME} demo
      All of it on a small pair that comes with the package.

The result is a plain PEFT folder: PeftModel.from_pretrained(model, "new-lora") loads it, without this package.
`{NAME} COMMAND --help` says more. Exit code: 0 when the result was written, 1 for an error, 2 for a wrong call."""
MAP_TAIL = f"""example:
  {NAME} map Qwen/Qwen2.5-0.5B Qwen/Qwen2.5-1.5B@main -o map"""
DATA = "JSON (a list of objects) or JSON lines with instruction, output and, where wanted, input"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that a terminal cannot show is no failure
    words = list(sys.argv[1:] if argv is None else argv)
    parser = _parser(words)
    args = parser.parse_args(words)
    if args.command == "map" and args.output is None and not args.plan:
        parser.error("map: one of the arguments -o/--output --plan is required")
    try:
        told, text = getattr(import_module(".commands", __package__), args.command)(args)
    except LoraSuiteError as error:
        if not is_first():
            time.sleep(PATIENCE)
        print(f"{NAME}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stopped:
        print(f"{NAME}: interrupted, {stopped or 'nothing was written'}", file=sys.stderr)
        return 130
    if not is_first():
        return 0
    if args.json:
        print(json.dumps(told, ensure_ascii=not (sys.stdout.encoding or "").lower().startswith("utf")))
    elif text and not args.quiet:
        print(text)
    return 0


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=NAME, description=HEAD, epilog=TAIL, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"{NAME} {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add in (_map, _upgrade, _distill, _finetune, _evaluate, _inspect, _chat, _families, _demo):
        add(commands)
    if {"-h", "--help"} & {*words}:
        commands.choices["upgrade"].epilog = _methods_told()  # the sources are read only for those who ask
    return parser


def _add(commands: Any, name: str, help_: str, epilog: str = "") -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=help_,
        description=help_[:1].upper() + help_[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.register("type", None, take.named)  # of all that have no other
    command.add_argument("-q", "--quiet", action="store_true", help="no progress and no text, only errors")
    command.add_argument("--json", action="store_true", help="print one JSON object instead of text, and no progress")
    return command


def _output(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument("-o", "--output", required=True, metavar="DIR", help=f"folder for {what}, new or empty")
    command.add_argument("--overwrite", action="store_true", help="replace the output folder if it holds something")


def _running(command: argparse.ArgumentParser) -> None:
    command.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
                         help="numbers in which the models run (default: the checkpoint's own)")  # fmt: skip
    command.add_argument("--device-map", metavar="MAP", help='as in transformers: "auto", "cuda:0", ...')
    command.add_argument("--trust-remote-code", action="store_true", help="let repositories run code of their own")


def _map(commands: Any) -> None:
    command = _add(commands, "map", "build the upgrade map of two backbones, once for all their adapters", MAP_TAIL)
    command.add_argument("old", metavar="OLD", help="old backbone")
    command.add_argument("new", metavar="NEW", help="new backbone")
    command.add_argument("-o", "--output", metavar="DIR", help="folder for the map, new or empty")
    command.add_argument("--overwrite", action="store_true", help="replace the output folder if it holds something")
    command.add_argument("--plan", action="store_true",
                         help="say what it would cost in time, memory and bytes, from the configs alone")  # fmt: skip
    command.add_argument("--methods", type=take.names, default=[], metavar="M[,M]",
                         help="add what these methods keep in a map (transport, cross-lora)")  # fmt: skip
    choices = {
        "--hidden-map": ("embeddings", "polar", "identity"),
        "--similarity": ("cka", "cca", "pwcca", "procrustes"),
        "--layer-map": ("cka", "first", "medium", "last", "proportional"),
        "--head-map": ("hungarian", "index"),
    }
    for name, values in choices.items():
        command.add_argument(name, choices=values, default=values[0], help=f"default: {values[0]}")
    command.add_argument("--calibration", metavar="FILE", help="text file for the layer similarity (default: built in)")
    command.add_argument("--tokens", type=take.positive, default=2048, help="calibration tokens (default: 2048)")
    command.add_argument("--seed", type=take.seed, default=0, help="of the choice of tokens (default: 0)")
    command.add_argument("--low-memory", action="store_true",
                         help="leave the layers on disk while the models run: the same map, slower")  # fmt: skip
    _running(command)


def _upgrade(commands: Any) -> None:
    command = _add(commands, "upgrade", "carry an adapter over to a new backbone")
    command.add_argument("--method", default="auto", metavar="M", help="see below (default: auto)")
    command.add_argument("--prompts", metavar="FILE", help="unlabelled prompts, for methods that run the models")
    _carrying(command)


def _distill(commands: Any) -> None:
    command = _add(
        commands, "distill", "carry an adapter over by a short training on prompts without labels",
        "The same as `upgrade --method distill --prompts FILE`: both backbones are run, and the new adapter is\n"
        "trained towards what the old one did to its backbone.",
    )  # fmt: skip
    command.add_argument("--prompts", metavar="FILE", required=True, help="text with a prompt a line, or JSON")
    command.set_defaults(method="distill")
    _carrying(command)


def _carrying(command: argparse.ArgumentParser) -> None:
    command.add_argument("adapter", metavar="ADAPTER", help="the old adapter")
    command.add_argument("--to", required=True, metavar="NEW", dest="new", help="new backbone")
    command.add_argument("--from", metavar="OLD", dest="old", help="old backbone (default: the adapter's config says)")
    command.add_argument(
        "--map", metavar="DIR", help="upgrade map of the pair (default: the kept one, built if need be)"
    )
    command.add_argument("--adapter-name", metavar="NAME", help="which one, where a folder holds several adapters")
    command.add_argument("--set", action="append", default=[], type=take.pair, metavar="KEY=VALUE", dest="options",
                         help="an option of the method; may be given more than once")  # fmt: skip
    command.add_argument("--rank", type=take.positive, metavar="R", help="rank of the result (default: the adapter's)")
    command.add_argument("--as", choices=("same", "lora"), default="same", dest="as_",
                         help="a DoRA stays a DoRA, or becomes a plain LoRA (default: same)")  # fmt: skip
    command.add_argument("--seed", type=take.seed, default=0, help="of whatever is drawn at random (default: 0)")
    command.add_argument("--finetune", metavar="DATA", help=f"labelled samples to fine-tune on afterwards: {DATA}")
    _training(command)
    _output(command, "the new adapter and its report")
    group = command.add_argument_group("publishing")
    group.add_argument("--push", metavar="REPO_ID", help="push the result to this repository of the Hub, with a card")
    group.add_argument("--private", action="store_true", help="the repository is, or becomes, private")
    group.add_argument("--create-pr", action="store_true", help="push as a pull request")
    group.add_argument("--base-model", metavar="ID", help="Hub id of the new backbone, where --to is a folder")
    _running(command)


def _finetune(commands: Any) -> None:
    command = _add(commands, "finetune", "train an adapter a little on labelled samples")
    command.add_argument("adapter", metavar="ADAPTER", help="the adapter, such as `upgrade` writes it")
    command.add_argument("--data", required=True, metavar="DATA", help=DATA)
    command.add_argument("--base", metavar="MODEL", help="backbone (default: the adapter's config says)")
    command.add_argument("--seed", type=take.seed, default=0, help="of the choice and order of samples (default: 0)")
    _training(command)
    _output(command, "the trained adapter")


def _training(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("fine-tuning (the defaults are the paper's)")
    group.add_argument(
        "--samples", type=take.positive, default=100, help="first N of a shuffle by the seed (default: 100)"
    )
    group.add_argument("--epochs", type=take.positive, default=3, help="default: 3")
    group.add_argument("--batch-size", type=take.positive, default=16, help="samples of one step (default: 16)")
    group.add_argument("--micro-batch-size", type=take.positive, metavar="N", help="samples read at once: less memory")
    group.add_argument("--learning-rate", type=float, default=1e-3, help="default: 1e-3")
    group.add_argument("--warmup", type=float, default=0.0, help="share of the steps (default: 0)")
    group.add_argument("--cutoff", type=take.positive, default=256, help="longest sample in tokens (default: 256)")
    group.add_argument("--template", metavar="TEXT",
                       help="prompt with {instruction} and {input} (default: the one of LLM-Adapters)")  # fmt: skip
    group.add_argument("--new-layers", choices=("train", "freeze"), default="train",
                       help="layers that match no old one: a LoRA of their own, or none (default: train)")  # fmt: skip


def _evaluate(commands: Any) -> None:
    command = _add(
        commands, "evaluate", "measure a model and adapters on the paper's benchmarks (lm-evaluation-harness)"
    )
    command.add_argument("model", metavar="MODEL_OR_ADAPTER", help="backbone, or an adapter that names its own")
    command.add_argument("--adapter", action="append", default=[], metavar="ADAPTER",
                         help="on that backbone, compared with it bare; may be given more than once")  # fmt: skip
    command.add_argument("--against", nargs="+", default=[], metavar="OTHER",
                         help="other models or adapters, each with its own backbone, to compare with")  # fmt: skip
    command.add_argument("--published", metavar="PAIR",
                         help='the paper\'s rows beside, such as "MiniCPM-S-1B -> MiniCPM-2B"')  # fmt: skip
    command.add_argument("--suite", default="commonsense", help="math, commonsense, or benchmarks with commas between")
    command.add_argument("--data", metavar="DIR", help="folder with NAME_test.json files (default: from the Hub)")
    command.add_argument("--limit", type=take.positive, metavar="N", help="items of each benchmark (default: all)")
    command.add_argument("--scoring", choices=("generate", "likelihood"), default="generate", help="default: generate")
    command.add_argument("--batch-size", type=take.positive, default=8, help="default: 8")
    command.add_argument("--template", metavar="TEXT", help="prompt with {instruction} (default: LLM-Adapters)")
    command.add_argument("--seed", type=take.seed, default=0, help="of the choice of items (default: 0)")
    command.add_argument("-o", "--output", metavar="DIR", help="folder for the scores as JSON and the table")
    command.add_argument("--overwrite", action="store_true", help="replace the output folder if it holds something")


def _inspect(commands: Any) -> None:
    command = _add(
        commands, "inspect", "write a report with pictures of a map or an upgraded adapter, as one HTML file"
    )
    command.add_argument("name", metavar="MAP_OR_ADAPTER", help="what `map` or `upgrade` wrote")
    command.add_argument("-o", "--output", required=True, metavar="FILE", help="the HTML file")
    command.add_argument("--overwrite", action="store_true", help="replace the output file if it exists")
    command.add_argument("--rows", metavar="DIR", help="measured rows, as evaluate -o DIR writes them: the gap's bars")
    command.add_argument("--map", metavar="DIR", help="for an adapter: the map that it was made with")
    command.add_argument("--old-adapter", metavar="ADAPTER", help="for an adapter: the one that it was made of")
    command.add_argument("--from", dest="old", metavar="OLD",
                         help="for an adapter: its old backbone (default: the old adapter's config says)")  # fmt: skip
    command.add_argument("--to", dest="new", metavar="NEW",
                         help="for an adapter: the new backbone (default: the adapter's config says)")  # fmt: skip


def _chat(commands: Any) -> None:
    command = _add(
        commands, "chat", "ask the bare backbone, the upgraded adapter and the old pair the same, side by side",
        "Without --prompt every line of the standard input is a question; the end of input ends it.",
    )  # fmt: skip
    command.add_argument("--base", required=True, metavar="NEW", help="new backbone")
    command.add_argument("--adapter", required=True, metavar="UPGRADED", help="the upgraded adapter")
    command.add_argument("--old", metavar="ADAPTER", help="the old adapter, for a third column")
    command.add_argument("--old-base", metavar="OLD", help="old backbone (default: the old adapter's config says)")
    command.add_argument("--prompt", metavar="TEXT", help="ask this one thing and stop")
    command.add_argument("--template", metavar="TEXT", help="prompt with {instruction} (default: the text as it is)")
    command.add_argument("--length", type=take.positive, default=128, help="tokens of an answer at most (default: 128)")
    _running(command)


def _families(commands: Any) -> None:
    _add(commands, "families", "list the model families that are known, and how their projections are laid out")


def _demo(commands: Any) -> None:
    command = _add(commands, "demo", "upgrade and fine-tune an adapter on the pair that comes with the package")
    command.add_argument("-o", "--output", default="demo-result", metavar="DIR",
                         help="folder for the adapters, table and picture (default: demo-result)")  # fmt: skip
    command.add_argument("--overwrite", action="store_true", help="replace the output folder if it holds something")
    command.add_argument("--samples", type=take.positive, default=100, help="labelled samples (default: 100)")


def _methods_told() -> str:
    from .families import methods

    lines = [f"  {name:<12}{summary}" for name, summary in methods().items()]
    return "\n".join(["methods:", f"  {'auto':<12}The one that suits the adapter.", *lines])
