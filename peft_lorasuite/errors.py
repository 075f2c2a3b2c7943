"""The one exception of the package, and checks of names and numbers that raise it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from numbers import Integral
from typing import Any

CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")
"""Characters that a terminal obeys or does not show: control characters, line breaks, direction marks, surrogates."""


def printable(text: str, keep: str = "") -> str:
    r"""Return a text with control characters written as ``\u001b``, except those in ``keep``."""
    return CONTROL.sub(lambda found: found[0] if found[0] in keep else f"\\u{ord(found[0]):04x}", text)


class LoraSuiteError(ValueError):
    """An error that the user can fix, with a message of one line.

    Args:
        what: What is wrong, as a clause without a period.
        where: File, layer, module or option in which it was found.
        got: The value that was found.
        wanted: The value that is expected.
        do: What the user can do about it, as an imperative clause.
    """

    def __init__(
        self, what: str, *, where: object = None, got: object = None, wanted: object = None, do: str | None = None
    ) -> None:
        self.what, self.where, self.got, self.wanted, self.do = what, where, got, wanted, do
        super().__init__(self._message())

    def _message(self) -> str:
        message = f"{self.where}: {self.what}" if self.where is not None else self.what
        pairs = [f"{name} {value}" for name, value in (("got", self.got), ("wanted", self.wanted)) if value is not None]
        if pairs:
            message += f" ({', '.join(pairs)})"
        return printable(f"{message}; {self.do}" if self.do else message)


def unknown_name_error(kind: str, name: str, known: Iterable[str], *, do: str | None = None) -> LoraSuiteError:
    """Build the error for a name that is not in a table; it suggests the closest known name."""
    names = sorted(known)
    close = get_close_matches(str(name), names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    advice = f"{hint}known: {', '.join(names) or 'none'}"
    return LoraSuiteError(f"unknown {kind} {name!r}", do=f"{advice}. {do}" if do else advice)


def short_message(error: BaseException, length: int = 240) -> str:
    """Return another library's error message on one line, cut to ``length`` characters: some fill a whole page."""
    message = " ".join(str(error).split())
    if not message or isinstance(error, KeyError):  # the message of a KeyError is only the key
        message = f"{type(error).__name__} {message}".rstrip()
    return message if len(message) <= length else f"{message[:length].rstrip()} ..."


@contextmanager
def error_context(where: object) -> Iterator[None]:
    """Set the place of errors that do not name one yet; used once, in the outermost public function."""
    try:
        yield
    except LoraSuiteError as error:
        if error.where is not None:
            raise
        raise LoraSuiteError(error.what, where=where, got=error.got, wanted=error.wanted, do=error.do) from error


MAX_SEED = 2**32 - 1
"""The largest seed that numpy accepts; the Trainer seeds numpy together with torch."""


def check_integer(name: str, value: Any, minimum: int = 1, maximum: int | None = None) -> None:
    """Raise `LoraSuiteError` unless ``value`` is an integer in the given range."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise LoraSuiteError("must be an integer", where=name, got=repr(value))
    if int(value) < minimum:
        raise LoraSuiteError(f"must be at least {minimum}", where=name, got=value)
    if maximum is not None and int(value) > maximum:
        raise LoraSuiteError(f"must be at most {maximum}", where=name, got=value)


def check_seed(seed: Any) -> None:
    """Raise `LoraSuiteError` unless every random generator in use accepts the seed."""
    check_integer("seed", seed, 0, MAX_SEED)
