"""Versions of the installed libraries, and the error for one that is too old."""

from __future__ import annotations

import re
from functools import cache
from importlib import metadata

from ..errors import LoraSuiteError


@cache
def installed(library: str) -> tuple[int, ...]:
    """Return the numbers of an installed library's version: ``(5, 24, 0)``."""
    return version_numbers(metadata.version(library))


def version_numbers(version: str) -> tuple[int, ...]:
    """Return the numbers of a version without a suffix such as ``rc1`` or ``+cpu``."""
    return tuple(int(part) for part in re.match(r"\d+(?:\.\d+)*", version)[0].split("."))  # type: ignore[index]


def has(library: str, minimum: str) -> bool:
    """Return whether an installed library has at least a version."""
    return installed(library) >= version_numbers(minimum)


def require(library: str, minimum: str, what: str, *, where: object = None) -> None:
    """Raise `LoraSuiteError` where an installed library is too old for something.

    Args:
        library: Name of the distribution.
        minimum: The first version that can do it.
        what: What needs it, as the subject of a clause.
        where: File or module in which it was found.
    """
    if not has(library, minimum):
        raise needs_version(library, minimum, what, where=where)


def needs_version(library: str, minimum: str, what: str, *, where: object = None) -> LoraSuiteError:
    """Build the error for something that an installed library is too old for; the arguments are those of `require`."""
    return LoraSuiteError(
        f"{what} needs a newer {library}", where=where, got=metadata.version(library), wanted=f">={minimum}",
        do=f"pip install '{library}>={minimum}'",
    )  # fmt: skip
