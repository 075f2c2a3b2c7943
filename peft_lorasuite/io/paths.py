"""What there is under a name that a user, or a stranger's file, gave; a name that cannot be asked for is an error."""

from __future__ import annotations

import stat
from pathlib import Path

from ..errors import LoraSuiteError

SHOWN = 120
"""Letters of a name that a message repeats."""


def is_folder(name: str | Path) -> bool:
    """Whether the name is a folder's."""
    return stat.S_ISDIR(_mode(name))


def is_file(name: str | Path) -> bool:
    """Whether the name is a file's."""
    return stat.S_ISREG(_mode(name))


def exists(name: str | Path) -> bool:
    """Whether there is anything under the name."""
    return _mode(name) != 0


def _mode(name: str | Path) -> int:
    try:
        return Path(name).expanduser().stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except (OSError, ValueError, RuntimeError) as error:  # too long or not ours; a null byte; a home of nobody
        text = str(name)
        raise LoraSuiteError(
            f"the name cannot be looked up: {getattr(error, 'strerror', None) or error}",
            where=text if len(text) <= SHOWN else f"{text[:SHOWN]}...", do="check the name and the rights to it",
        ) from error  # fmt: skip
