"""Values of a method's options: text from the command line or objects from Python, checked against their types."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, get_args, get_origin

from ..errors import LoraSuiteError

WORDS = {
    type(None): "none", bool: "yes or no", int: "a whole number", float: "a number", tuple: "words with commas between",
    str: "a word",
}  # fmt: skip
"""What a type is called before users; the first that a value fits is taken."""
NONE, YES, NO = ("none", "auto"), ("true", "yes", "1"), ("false", "no", "0")
"""How they are written on a command line."""


def converted(name: str, value: Any, kind: Any) -> Any:
    """Return an option's value in its type, from text or as it is.

    Args:
        name: The option.
        value: Text of the command line, or an object.
        kind: The option's type: one of `WORDS`, a union of them, or ``tuple[str, ...]``.

    Raises:
        LoraSuiteError: For a value of another type, and for numbers that are not finite.
    """
    kinds = (tuple,) if get_origin(kind) is tuple else get_args(kind) or (kind,)
    for one in WORDS:
        if one in kinds:
            try:
                return READ[one](value)
            except (ValueError, TypeError):
                continue
    wanted = " or ".join(WORDS[one] for one in WORDS if one in kinds)
    raise LoraSuiteError("an option has a value of another type", where=name, got=repr(value), wanted=wanted or kind)


def _none(value: Any) -> None:
    if value is not None and str(value).lower() not in NONE:
        raise ValueError(value)


def _bool(value: Any) -> bool:
    said = str(value).lower()
    if not isinstance(value, (bool, str)) or said not in (*YES, *NO):
        raise ValueError(value)
    return said in YES


def _int(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (Integral, str)):
        raise ValueError(value)
    return int(value)


def _float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (Real, str)) or not math.isfinite(float(value)):
        raise ValueError(value)
    return float(value)


def _tuple(value: Any) -> tuple[str, ...]:
    words = value.split(",") if isinstance(value, str) else tuple(value)
    return tuple(_str(word).strip() for word in words)


def _str(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(value)
    return value


READ: dict[Any, Callable[[Any], Any]] = {
    type(None): _none, bool: _bool, int: _int, float: _float, tuple: _tuple, str: _str,
}  # fmt: skip
