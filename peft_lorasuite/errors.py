"""The one exception family of the package."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from numbers import Integral
from typing import Any


class LoraSuiteError(ValueError):
    """A fault that the user can mend, told in one sentence.

    Args:
        what: What is wrong, as a clause without a full stop.
        where: File, layer, module or option in which it was found.
        got: The value that was found.
        wanted: The value that would have been right.
        do: What the user can do about it.
    """

    def __init__(
        self, what: str, *, where: object = None, got: object = None, wanted: object = None, do: str | None = None
    ) -> None:
        self.what, self.where, self.got, self.wanted, self.do = what, where, got, wanted, do
        super().__init__(self._sentence())

    def _sentence(self) -> str:
        text = f"{self.where}: {self.what}" if self.where is not None else self.what
        pair = [f"{name} {value}" for name, value in (("got", self.got), ("wanted", self.wanted)) if value is not None]
        if pair:
            text += f" ({', '.join(pair)})"
        return f"{text}; {self.do}" if self.do else text


def unknown_name_error(kind: str, name: str, known: Iterable[str], *, do: str | None = None) -> LoraSuiteError:
    """Build the error for a name that is not in a table, with the nearest known name first."""
    names = sorted(known)
    near = get_close_matches(str(name), names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    advice = f"{hint}known: {', '.join(names) or 'none'}"
    return LoraSuiteError(f"unknown {kind} {name!r}", do=f"{advice}. {do}" if do else advice)


def short_message(error: BaseException, length: int = 240) -> str:
    """Return another library's message in one line: some print a whole page."""
    info = " ".join(str(error).split())
    if not info or isinstance(error, KeyError):  # whose message is the key alone
        info = f"{type(error).__name__} {info}".rstrip()
    return info if len(info) <= length else f"{info[:length].rstrip()} ..."


@contextmanager
def error_context(where: object) -> Iterator[None]:
    """Add the place to an error that does not name one yet; used once, at the outermost verb."""
    try:
        yield
    except LoraSuiteError as error:
        if error.where is not None:
            raise
        raise LoraSuiteError(error.what, where=where, got=error.got, wanted=error.wanted, do=error.do) from error


MAX_SEED = 2**32 - 1
"""What numpy takes, which the Trainer seeds beside torch."""


def check_integer(name: str, value: Any, least: int = 1, most: int | None = None) -> None:
    """Refuse what is no whole number, and one out of range."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise LoraSuiteError("must be a whole number", where=name, got=repr(value))
    if int(value) < least:
        raise LoraSuiteError(f"must be at least {least}", where=name, got=value)
    if most is not None and int(value) > most:
        raise LoraSuiteError(f"must be at most {most}", where=name, got=value)


def check_seed(seed: Any) -> None:
    """Refuse a seed that one of the generators would not take."""
    check_integer("seed", seed, 0, MAX_SEED)
