"""How results show themselves: a few lines in a terminal, a table in a notebook."""

from __future__ import annotations

from html import escape


def one_line(text: str, length: int) -> str:
    """Return a text on one line, cut at its end if it is longer than ``length``."""
    words = " ".join(text.split())
    return words if len(words) <= length else f"{words[: length - 1]}…"


class Summarized:
    """Base of results that show a title and a few named values instead of all their tensors."""

    def _summary(self) -> tuple[str, dict[str, str]]:
        """Return the title, and name -> value of each line."""
        raise NotImplementedError

    def __repr__(self) -> str:
        title, rows = self._summary()
        width = max(map(len, rows), default=0)
        return "\n".join([title, *(f"  {name:{width}}  {value}" for name, value in rows.items())])

    def _repr_html_(self) -> str:
        """Return a table for notebooks."""
        title, rows = self._summary()
        cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows.items())
        return f"<table><caption>{escape(title)}</caption>{cells}</table>"
