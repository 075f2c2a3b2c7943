"""Checks of paths from users and untrusted files; a path that the system cannot look up is a `LoraSuiteError`."""

from __future__ import annotations

import stat
from pathlib import Path

from ..errors import LoraSuiteError

MAX_SHOWN = 120
"""Characters of a path that an error message repeats."""


def is_folder(name: str | Path) -> bool:
    """Whether a folder of this name exists."""
    return stat.S_ISDIR(_mode(name))


def is_file(name: str | Path) -> bool:
    """Whether a regular file of this name exists."""
    return stat.S_ISREG(_mode(name))


def exists(name: str | Path) -> bool:
    """Whether a file or folder of this name exists."""
    return _mode(name) != 0


def _mode(name: str | Path) -> int:
    try:
        return Path(name).expanduser().stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except (OSError, ValueError, RuntimeError) as error:  # name too long or no permission; null byte; unknown ~user
        text = str(name)
        raise LoraSuiteError(
            f"the path cannot be accessed: {getattr(error, 'strerror', None) or error}",
            where=text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}...",
            do="check the path and its permissions",
        ) from error  # fmt: skip
