"""Values of a method's options, from the command line or from Python, converted to the types of its dataclass."""

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

NONE, TRUE, FALSE = ("none", "auto"), ("true", "yes", "1"), ("false", "no", "0")
"""How these values are written on a command line."""
LARGEST = 1e6
"""Limit of floats: no option needs larger ones, and their products overflow float32."""


class Kind(NamedTuple):
    """A type of options: its name in messages, and the function that converts a value to it."""

    label: str
    read: Callable[[Any], Any]


def _none(value: Any) -> None:
    if value is not None and str(value).lower() not in NONE:
        raise ValueError(value)


def _bool(value: Any) -> bool:
    text = str(value).lower()
    if not isinstance(value, (bool, str)) or text not in (*TRUE, *FALSE):
        raise ValueError(value)
    return text in TRUE


def _int(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (Integral, str)):
        raise ValueError(value)
    return int(value)


def _float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (Real, str)) or not math.isfinite(float(value)):
        raise ValueError(value)
    return float(value)


def _tuple(value: Any) -> tuple[str, ...]:
    items = value.split(",") if isinstance(value, str) else tuple(value)
    return tuple(_str(item).strip() for item in items)


def _str(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(value)
    return value


KINDS: dict[Any, Kind] = {
    type(None): Kind("none", _none),
    bool: Kind("true or false", _bool),
    int: Kind("an integer", _int),
    float: Kind("a number", _float),
    tuple[str, ...]: Kind("comma-separated names", _tuple),
    str: Kind("a string", _str),
}
"""The types of options; of the types in a union the first that fits is used."""


def convert(name: str, value: Any, kind: Any) -> Any:
    """Convert the value of an option to its type.

    Args:
        name: Name of the option.
        value: Text from the command line, or an object.
        kind: Type of the option: one of `KINDS`, or a union. Objects for other types are returned unchanged; the
            method's dataclass has to check them.

    Raises:
        LoraSuiteError: For a value of another type, and for a number that is not finite or too large.
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
    wanted = " or ".join(KINDS[one].label for one in known) or kind
    raise LoraSuiteError("an option has the wrong type", where=name, got=repr(value), wanted=wanted)


def make_options(chosen: Method, options: Any) -> Any:
    """Return a method's options, checked field by field.

    Args:
        chosen: The method.
        options: An instance of its dataclass, a mapping, or None for the defaults.

    Raises:
        LoraSuiteError: For an unknown option, and for a value of the wrong type or out of range.
    """
    if isinstance(options, chosen.options):
        values = {item.name: getattr(options, item.name) for item in fields(options) if item.init}
        return replace(options, **_convert_all(type(options), values))
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
    return chosen.options(**_convert_all(chosen.options, options))


def check_bounds(options: Any, least: Mapping[str, float], most: Mapping[str, float] | None = None) -> None:
    """Check that options are within bounds.

    Args:
        options: The options; None values are skipped, since they are resolved later.
        least: Option -> smallest value.
        most: Option -> largest value.

    Raises:
        LoraSuiteError: For a value out of bounds.
    """
    for label, bounds, beyond in (("at least", least, lt), ("at most", most or {}, gt)):
        for name, bound in bounds.items():
            value = getattr(options, name)
            if value is not None and beyond(value, bound):
                raise LoraSuiteError("an option is out of range", where=name, got=value, wanted=f"{label} {bound:g}")


def _convert_all(options: type, values: Mapping[str, Any]) -> dict[str, Any]:
    types = get_type_hints(options)
    return {name: convert(name, value, types[name]) for name, value in values.items()}
