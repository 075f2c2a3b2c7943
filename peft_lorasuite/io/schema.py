"""Schemas of files: which types and values their fields have, checked before anything else reads them.

A schema is a `Kind`. `check` raises one `LoraSuiteError` that names the field, so that the code which reads the file
never meets a wrong type.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import CONTROL, LoraSuiteError
from .patterns import find_fault

LARGEST = 2**53
"""Largest integer that all JSON readers can represent."""
MAX_DEPTH = 64
"""Largest nesting of lists and objects in a file."""


class MismatchError(Exception):
    """A field that does not fit its kind."""

    def __init__(self, path: str, value: object, wanted: str, what: str = "malformed value") -> None:
        super().__init__(path)
        self.path, self.value, self.wanted, self.what = path, value, wanted, what


@dataclass(frozen=True)
class Kind:
    """A kind of value.

    Attributes:
        wanted: The kind in words, for the error message.
        accepts: Whether a value is of this kind.
    """

    wanted: str
    accepts: Callable[[Any], bool] = field(default=lambda value: True, repr=False)

    def check(self, value: Any, path: str) -> None:
        """Raise `MismatchError` unless the value is of this kind."""
        if not self.accepts(value):
            raise MismatchError(path, value, self.wanted)


def integer(low: int = -LARGEST, high: int = LARGEST) -> Kind:
    """Return the kind of integers in a range; true and false are none."""
    limits = f" of at least {low}" if high == LARGEST else f" from {low} to {high}"
    return Kind(
        f"an integer{limits if low > -LARGEST else ''}", lambda value: type(value) is int and low <= value <= high
    )


def number(low: float = -sys.float_info.max, *, above: float | None = None, high: float = sys.float_info.max) -> Kind:
    """Return the kind of finite numbers in a range."""
    limits = f" above {above:g}" if above is not None else f" of at least {low:g}" if low > -1e300 else ""
    limits += f" and at most {high:g}" if high < 1e300 else ""
    low = low if above is None else above

    def accepts(value: Any) -> bool:
        return type(value) in (int, float) and low <= value <= high and value != above

    return Kind(f"a number{limits}", accepts)


def one_of(*values: str) -> Kind:
    """Return the kind of some strings."""
    return Kind(" or ".join(values), lambda value: isinstance(value, str) and value in values)


ANY = Kind("any value")
NULL = Kind("null", lambda value: value is None)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))


@dataclass(frozen=True)
class Text(Kind):
    """A string.

    Attributes:
        unwanted: Characters that it cannot have.
    """

    wanted: str = "a string"
    unwanted: re.Pattern[str] = CONTROL

    def check(self, value: Any, path: str) -> None:
        """Raise `MismatchError` for anything else."""
        if not isinstance(value, str):
            raise MismatchError(path, value, self.wanted)
        if self.unwanted.search(value):
            raise MismatchError(path, value, "text without them", "control characters")


NAME, TEXT = Text(), Text(unwanted=re.compile("[\0\ud800-\udfff]"))


@dataclass(frozen=True)
class Pattern(Kind):
    """A regular expression that takes little time to match.

    Attributes:
        inside: What PEFT puts around it.
    """

    wanted: str = "a name or a regular expression"
    inside: str = "{}"

    def check(self, value: Any, path: str) -> None:
        """Raise `MismatchError` for anything else."""
        NAME.check(value, path)
        fault = find_fault([value, self.inside.replace("{}", value)])
        if fault:
            raise MismatchError(path, value, "the names of the modules, or a simpler pattern", fault)


@dataclass(frozen=True)
class Either(Kind):
    """A value of one of several kinds."""

    wanted: str = ""
    kinds: tuple[Kind, ...] = ()

    def check(self, value: Any, path: str) -> None:
        """Raise the `MismatchError` of the kind that fits best."""
        found: list[MismatchError] = []
        for kind in self.kinds:
            try:
                return kind.check(value, path)
            except MismatchError as mismatch:
                found.append(mismatch)
        inner = [one for one in found if one.path != path or one.what != "malformed value"]
        raise inner[0] if inner else MismatchError(path, value, " or ".join(one.wanted for one in found))


def either(*kinds: Kind) -> Kind:
    """Return the kind of values that are of one of several kinds."""
    return Either(kinds=kinds)


def optional(kind: Kind) -> Kind:
    """Return the kind that also accepts null."""
    return either(kind, NULL)


@dataclass(frozen=True)
class ListOf(Kind):
    """A list whose items are of one kind."""

    wanted: str = "a list"
    item: Kind = ANY
    fewest: int = 0
    most: int = LARGEST

    def check(self, value: Any, path: str) -> None:
        """Raise `MismatchError` for the first item that does not fit."""
        if not isinstance(value, (list, tuple)) or not self.fewest <= len(value) <= self.most:
            count = f" of {self.fewest}" if self.fewest == self.most else " with items" if self.fewest else ""
            raise MismatchError(path, value, f"a list{count}")
        for index, item in enumerate(value):
            self.item.check(item, f"{path}[{index}]")


@dataclass(frozen=True)
class Record(Kind):
    """An object.

    Attributes:
        fields: Name -> kind.
        required: The fields that cannot be absent.
        others: Kind of all other fields; None if there can be none.
        patterns: Whether the names are regular expressions, which PEFT matches.
    """

    wanted: str = "an object"
    fields: Mapping[str, Kind] = field(default_factory=dict)
    required: Sequence[str] = ()
    others: Kind | None = None
    patterns: bool = False

    def check(self, value: Any, path: str) -> None:
        """Raise `MismatchError` for the first field that does not fit."""
        if not isinstance(value, Mapping):
            raise MismatchError(path, value, self.wanted)
        here = f"{path}." if path else ""
        for name in self.required:
            if name not in value:
                raise MismatchError(f"{here}{name}", None, self.fields[name].wanted or "a value", "missing value")
        for name, item in value.items():
            NAME.check(name, path)
            kind = self.fields.get(name, self.others)
            if kind is None:
                raise MismatchError(f"{here}{name}", item, f"one of {', '.join(self.fields)}", "unknown field")
            kind.check(item, f"{here}{name}")
        fault = find_fault([*value, *(rf"(.*\.)?({name})$" for name in value)]) if self.patterns else None
        if fault:
            raise MismatchError(path, value, "the names of modules, or simpler patterns", fault)


def table_of(kind: Kind, *, patterns: bool = False) -> Record:
    """Return the kind of objects with any names, whose values are of one kind."""
    return Record(others=kind, patterns=patterns)


@dataclass(frozen=True)
class Plain(Kind):
    """Any JSON value whose names have no control characters.

    Attributes:
        text: Kind of its strings.
        whole: Kind of its integers.
    """

    wanted: str = "plain JSON values"
    text: Kind = NAME
    whole: Kind = field(default_factory=integer)

    def check(self, value: Any, path: str) -> None:
        """Raise `MismatchError` for the first value that does not fit."""
        if isinstance(value, Mapping):
            table_of(self).check(value, path)
        elif isinstance(value, (list, tuple)):
            ListOf(item=self).check(value, path)
        elif isinstance(value, str):
            self.text.check(value, path)
        elif type(value) is int:
            self.whole.check(value, path)


PLAIN, LOOSE = Plain(), Plain(text=ANY, whole=ANY)
"""Values with exact integers and strings without control characters; values of which only the names are checked."""


def check(values: Any, schema: Kind, *, where: str, do: str = "fix the file, or fetch it again") -> None:
    """Check the values of a file.

    Args:
        values: The values.
        schema: Their schema.
        where: The file, for the message.
        do: What the user can do.

    Raises:
        LoraSuiteError: For the first field that does not fit; the message names it.
    """
    try:
        _check_depth(values)
        schema.check(values, "")
    except MismatchError as mismatch:
        got = None if mismatch.what == "missing value" else _shorten(repr(mismatch.value))
        place = f"{where}, {_shorten(mismatch.path)}" if mismatch.path else where
        raise LoraSuiteError(mismatch.what, where=place, got=got, wanted=mismatch.wanted, do=do) from None


def _check_depth(values: Any) -> None:
    """Raise `MismatchError` for nesting that code which visits values recursively may not survive."""
    level = [values] if isinstance(values, (Mapping, list)) else []
    for _ in range(MAX_DEPTH):
        inner: list[Iterable[Any]] = [one.values() if isinstance(one, Mapping) else one for one in level]
        level = [value for items in inner for value in items if isinstance(value, (Mapping, list))]
        if not level:
            return
    raise MismatchError("", "deeper lists or objects", f"at most {MAX_DEPTH} levels", "too deeply nested")


def _shorten(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:80]}..."
