"""What every command does first: names with revisions, how much is said, backbones."""

from __future__ import annotations

import logging
import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

from .errors import LoraSuiteError
from .processes import is_first
from .progress import Progress, bars, silent

Told = tuple[dict[str, Any], str]
"""What a command tells a machine, and what it tells a human."""


def name_and_revision(text: str) -> tuple[str, str | None]:
    """Split ``ID@REVISION``; a folder is a folder whatever its name."""
    if "@" not in text or Path(text).expanduser().exists():
        return text, None
    name, _, revision = text.rpartition("@")
    if not name or not revision:
        raise LoraSuiteError("the revision or the name is missing", where=text, wanted="ID@REVISION")
    return name, revision


def begin(args: Namespace) -> Progress:
    """Say how much the libraries may say, and return how progress is shown."""
    shown = not (args.quiet or args.json) and is_first()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger(__package__).setLevel(logging.INFO if shown else logging.ERROR)
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
    dtype = getattr(args, "dtype", "auto")
    return kind.open(name, revision=revision, trust_remote_code=args.trust_remote_code, dtype=dtype)
