"""Values of a method's options: text from the command line or objects from Python, checked against their types."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from numbers import Integral, Real
from operator import gt, lt
from types import UnionType
from typing import TYPE_CHECKING, Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from ..errors import LoraSuiteError, unknown_name_error

if TYPE_CHECKING:
    from .registry import Method

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


def convert(name: str, value: Any, kind: Any) -> Any:
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


def make_options(chosen: Method, options: Any) -> Any:
    """Return a method's options from its own dataclass, a mapping or None, checked field by field."""
    if isinstance(options, chosen.options):
        values = {item.name: getattr(options, item.name) for item in fields(options) if item.init}
        return replace(options, **_typed(type(options), values))
    if options is None:
        return chosen.options()
    if not isinstance(options, Mapping):
        raise LoraSuiteError(
            "the options belong to another method", where=chosen.name, got=type(options).__name__,
            wanted=chosen.options.__name__,
        )  # fmt: skip
    known = {item.name for item in fields(chosen.options)}
    for name in options:
        if name not in known:
            raise unknown_name_error(f"option of {chosen.name}", name, known)
    return chosen.options(**_typed(chosen.options, options))


def check_bounds(options: Any, least: Mapping[str, float], most: Mapping[str, float] | None = None) -> None:
    """Refuse options out of range, each option -> smallest or largest value; None passes, it is resolved later."""
    for word, bounds, beyond in (("at least", least, lt), ("at most", most or {}, gt)):
        for name, bound in bounds.items():
            value = getattr(options, name)
            if value is not None and beyond(value, bound):
                raise LoraSuiteError("an option is out of range", where=name, got=value, wanted=f"{word} {bound:g}")


def _typed(options: type, values: Mapping[str, Any]) -> dict[str, Any]:
    types = get_type_hints(options)
    return {name: convert(name, value, types[name]) for name, value in values.items()}
