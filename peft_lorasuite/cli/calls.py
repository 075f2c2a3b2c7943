"""What every command does first: names with revisions, how much is said, backbones."""

from __future__ import annotations

import logging
import warnings
from argparse import Namespace
from typing import Any

from ..io.source import name_and_revision
from ..models.distributed import is_first
from ..progress import Progress, bars, silent

Told = tuple[dict[str, Any], str]
"""What a command tells a machine, and what it tells a human."""


def begin(args: Namespace) -> Progress:
    """Say how much the libraries may say, and return how progress is shown."""
    shown = not (args.quiet or args.json) and is_first()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("peft_lorasuite").setLevel(logging.INFO if shown else logging.ERROR)
    if args.quiet:
        warnings.simplefilter("ignore")
    if not shown:
        from huggingface_hub.utils import disable_progress_bars
        from transformers.utils import logging as transformers_logging

        disable_progress_bars()
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
    return bars if shown else silent


def open_backbone(kind: Any, text: str, args: Namespace) -> Any:
    """Open a backbone by its name on the command line; ``kind`` is `Backbone`, which the caller has imported."""
    name, revision = name_and_revision(text)
    running = {"dtype": getattr(args, "dtype", "auto"), "device_map": getattr(args, "device_map", None)}
    return kind.open(name, revision=revision, trust_remote_code=args.trust_remote_code, **running)
