"""Shared parts of the commands: types and groups of arguments, logging, progress."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import LoraSuiteError, check_integer, check_seed, printable
from ..io.source import LoadOptions
from ..models.distributed import is_main_process
from ..progress import Progress, no_progress
from .brief_help import BriefParser, HelpFormatter
from .stages import show_stages

if TYPE_CHECKING:
    from ..text.chat_options import ChatOptions

NAME = "peft-lorasuite"
DATA = (
    "a file (JSON, JSON Lines, CSV or Parquet) or a Hub dataset (owner/name:config:split) of conversations (messages), "
    "of instruction and output, or of prompt and completion"
)
PROMPTS = (
    f"{DATA}; answers are not used; a .txt file has one prompt per line; or self (the old models write them), or "
    "built-in"
)

Output = tuple[dict[str, Any], str]
"""What a command returns: the values for ``--json``, and the text for a terminal."""


def add_command(commands: Any, name: str, summary: str, epilog: str = "") -> BriefParser:
    """Add a command with the options that all commands have."""
    command = commands.add_parser(
        name, help=summary, description=summary[:1].upper() + summary[1:] + ".", epilog=epilog,
        formatter_class=HelpFormatter,
    )  # fmt: skip
    command.register("type", None, non_empty)  # the type of all arguments without another
    command.add_argument("-q", "--quiet", action="store_true", help="no progress and no text, only errors")
    command.add_argument("--json", action="store_true", help="print one JSON object instead of text, and no progress")
    return command


def add_output(command: ArgumentParser, what: str) -> None:
    """Add ``-o DIR`` and ``--overwrite``."""
    command.add_argument("-o", "--output", required=True, metavar="DIR", help=f"folder for {what}, new or empty")
    add_overwrite(command)


def add_overwrite(command: ArgumentParser, what: str = "folder if it is not empty") -> None:
    """Add ``--overwrite``."""
    command.add_argument("--overwrite", action="store_true", help=f"replace the output {what}")


def add_loading(command: ArgumentParser) -> None:
    """Add the options of loading models."""
    command.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
                         help="dtype in which the models run (default: auto)")  # fmt: skip
    command.add_argument("--device-map", metavar="MAP", help='as in transformers: "auto", "cuda:0", ...')
    command.add_argument("--trust-remote-code", action="store_true", help="let repositories run their own code")


def add_engine(command: ArgumentParser, *, required: bool, what: str) -> None:
    """Add ``--for ENGINE``."""
    from ..serving.engines import ENGINES

    command.add_argument(
        "--for", dest="engine", required=required, choices=tuple(ENGINES), metavar="ENGINE",
        help=f"{what}: {', '.join(ENGINES)}",
    )  # fmt: skip


def add_written_form(command: ArgumentParser) -> None:
    """Add the options of a written adapter: its dtype, and the name of its backbone."""
    command.add_argument("--save-dtype", default="float32", choices=("float32", "float16", "bfloat16"),
                         help="dtype of the written factors (default: float32)")  # fmt: skip
    command.add_argument("--base-model", metavar="ID", help="Hub id of the backbone, where it is a folder")


def add_labels(command: ArgumentParser) -> None:
    """Add the options of classifiers."""
    command.add_argument("--labels", type=names, metavar="A,B,...",
                         help="names of a classifier's labels (default: those beside the adapter)")  # fmt: skip
    command.add_argument("--problem-type", metavar="P", help="problem_type of a classifier, as in transformers")


def add_training(command: ArgumentParser) -> None:
    """Add the options of light fine-tuning."""
    group = command.add_argument_group("fine-tuning (defaults: those of the paper)")
    group.add_argument(
        "--samples", type=positive, default=100, help="the first N of a shuffle by the seed (default: 100)"
    )
    group.add_argument("--epochs", type=positive, default=3, help="default: 3")
    group.add_argument("--batch-size", type=positive, default=16, help="samples per step (default: 16)")
    group.add_argument("--micro-batch-size", type=positive, metavar="N", help="samples per forward pass: less memory")
    group.add_argument("--learning-rate", type=float, default=1e-3, help="default: 1e-3")
    group.add_argument("--warmup", type=float, default=0.0, help="fraction of the steps (default: 0)")
    group.add_argument("--cutoff", type=positive, default=256, help="maximum length in tokens (default: 256)")
    group.add_argument("--template", metavar="TEXT",
                       help="prompt with {instruction} and {input} (default: that of LLM-Adapters)")  # fmt: skip
    group.add_argument("--new-layers", choices=("train", "freeze"), default="train",
                       help="layers without a matching old layer: a new LoRA, or none (default: train)")  # fmt: skip


def add_chat(command: ArgumentParser, *, old: bool, formats: bool = False) -> None:
    """Add the options of rendering conversations; ``old`` adds those of the old side, ``formats`` that of prompts."""
    group = command.add_argument_group("conversations (default: the chat template of each side's tokenizer)")
    if old:
        group.add_argument("--old-template", metavar="FILE", help="chat template of the old side, or none")
    names = "none, or old for that of the old side" if old else "or none"
    group.add_argument("--new-template", metavar="FILE", help=f"chat template of the new side, {names}")
    group.add_argument("--template-kwargs", action="append", default=[], type=pair, metavar="KEY=VALUE",
                       help="a variable of the templates, such as enable_thinking=false; may be repeated")  # fmt: skip
    group.add_argument("--system", metavar="TEXT", help="system prompt of conversations that have none")
    if formats:
        group.add_argument("--format", default="auto", metavar="F", dest="prompt_format",
                           help="format of built-in prompts and of instructions: auto (as the adapter was trained), "
                                "chat, alpaca, plain, question, vicuna, or a file with {instruction}")  # fmt: skip


def chat_options(args: Namespace) -> ChatOptions:
    """Return the options of rendering conversations."""
    from ..text.chat_options import ChatOptions, parse_variable

    variables = {name: parse_variable(text) for name, text in args.template_kwargs}
    form = getattr(args, "prompt_format", "auto")
    return ChatOptions(getattr(args, "old_template", None), args.new_template, variables, args.system, form)


def training_options(args: Namespace) -> dict[str, Any]:
    """Return the options of light fine-tuning as keywords of `finetune`."""
    names = (
        "samples", "epochs", "batch_size", "micro_batch_size", "learning_rate", "warmup", "cutoff", "template",
        "new_layers", "seed",
    )  # fmt: skip
    return {name: getattr(args, name) for name in names}


def load_options(args: Namespace) -> LoadOptions:
    """Return the options of loading models."""
    return LoadOptions(dtype=args.dtype, device_map=args.device_map, trust_remote_code=args.trust_remote_code)


def setup_logging(args: Namespace) -> Progress:
    """Set how much the libraries log, and return how progress is shown."""
    shown = not (args.quiet or args.json) and is_main_process()
    handler = _Handler()
    handler.setFormatter(_PrintableFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("peft_lorasuite").setLevel(logging.INFO if shown else logging.ERROR)
    if args.quiet:
        warnings.simplefilter("ignore")
    warnings.filterwarnings("ignore", module=r"(accelerate|peft|torch|transformers)\b")  # what matters is an error here
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # a bar for every model that is loaded
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        transformers_logging.set_verbosity_error()
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils import logging as hub_logging

    if "HF_HUB_VERBOSITY" not in os.environ:
        hub_logging.set_verbosity_error()  # its warnings have signed URLs, and the error says what happened
    if not shown:
        disable_progress_bars()
    return show_stages() if shown else no_progress


class _Handler(logging.StreamHandler[Any]):
    """Writes to what is standard error at the time: a bar that is shown there moves out of the way."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a message."""
        self.stream = sys.stderr
        super().emit(record)


class _PrintableFormatter(logging.Formatter):
    """Writes the names in a message, which can come from untrusted files, without control characters."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), keep="\n\t")


def non_empty(text: str) -> str:
    """Parse a name, a path or a text; refuse an empty one, as from an unset shell variable."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty: give a value, or leave it out")
    return text


def positive(text: str) -> int:
    """Parse an integer of at least 1."""
    return _integer(text, lambda value: check_integer("", value))


def seed(text: str) -> int:
    """Parse a seed."""
    return _integer(text, check_seed)


def names(text: str) -> list[str]:
    """Parse comma-separated names."""
    return [name.strip() for name in text.split(",") if name.strip()]


def pair(text: str) -> tuple[str, str]:
    """Parse KEY=VALUE."""
    key, found, value = text.partition("=")
    if not found or not key:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    return key.replace("-", "_"), value


def _integer(text: str, check: Callable[[int], None]) -> int:
    try:
        value = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected an integer, got {text!r}") from error
    try:
        check(value)
    except LoraSuiteError as error:
        raise argparse.ArgumentTypeError(f"{error.what}, got {text}") from error
    return value
