"""What the words of a command line may say: the types of its arguments."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from ..checks import check_seed, check_whole
from ..errors import LoraSuiteError


def named(text: str) -> str:
    """Take a name, a path or a text; an empty one, as of an unset variable of a shell, would count as not given."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty: name something, or leave it out")
    return text


def positive(text: str) -> int:
    """Take a whole number from 1."""
    return _whole(text, lambda value: check_whole("", value))


def seed(text: str) -> int:
    """Take a seed."""
    return _whole(text, check_seed)


def names(text: str) -> list[str]:
    """Take names with commas between."""
    return [name.strip() for name in text.split(",") if name.strip()]


def pair(text: str) -> tuple[str, str]:
    """Take KEY=VALUE."""
    key, found, value = text.partition("=")
    if not found or not key:
        raise argparse.ArgumentTypeError(f"wanted KEY=VALUE, got {text!r}")
    return key.replace("-", "_"), value


def _whole(text: str, check: Callable[[int], None]) -> int:
    try:
        value = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"wanted a whole number, got {text!r}") from error
    try:
        check(value)
    except LoraSuiteError as error:
        raise argparse.ArgumentTypeError(f"{error.what}, got {text}") from error
    return value
