"""Values of a method's options: text from the command line or objects from Python, checked against their types."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from types import UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin

from ..errors import LoraSuiteError

NONE, YES, NO = ("none", "auto"), ("true", "yes", "1"), ("false", "no", "0")
"""How they are written on a command line."""


LARGEST = 1e6
"""Of a number that is not whole: no option means anything beyond it, and products of larger ones leave float32."""


class Kind(NamedTuple):
    """A type of options: what it is called before users, and what makes its values of text or objects."""

    word: str
    read: Callable[[Any], Any]


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


KINDS: dict[Any, Kind] = {
    type(None): Kind("none", _none),
    bool: Kind("yes or no", _bool),
    int: Kind("a whole number", _int),
    float: Kind("a number", _float),
    tuple[str, ...]: Kind("words with commas between", _tuple),
    str: Kind("a word", _str),
}
"""The types that options have; of several in a union the first that a value fits is taken."""


def converted(name: str, value: Any, kind: Any) -> Any:
    """Return an option's value in its type, from text or as it is.

    Args:
        name: The option.
        value: Text of the command line, or an object.
        kind: The option's type: one of `KINDS`, or a union. An object for a type that is not among these is passed on,
            for a method to check.

    Raises:
        LoraSuiteError: For a value of another type, and for numbers that are not finite.
    """
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    known = [one for one in KINDS if one in kinds]
    for one in known:
        try:
            read = KINDS[one].read(value)
        except (ValueError, TypeError, OverflowError):
            continue
        if isinstance(read, float) and abs(read) > LARGEST:
            raise LoraSuiteError("an option is out of range", where=name, got=value, wanted=f"at most {LARGEST:g}")
        return read
    if len(known) < len(kinds) and not isinstance(value, str):
        return value
    wanted = " or ".join(KINDS[one].word for one in known) or kind
    raise LoraSuiteError("an option has a value of another type", where=name, got=repr(value), wanted=wanted)
