"""How results show themselves: a few lines in a terminal, a table in a notebook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import takewhile


def one_line(text: str, length: int) -> str:
    """Return a text on one line, cut at its end if it is longer than ``length``."""
    words = " ".join(text.split())
    return words if len(words) <= length else f"{words[: length - 1]}…"


def without_template(samples: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Return the sample answers of a report without the lines that all prompts begin and end with: a prompt template.

    Args:
        samples: Entries ``samples`` of a report, each with its ``prompt``.
    """
    prompts = [sample["prompt"] for sample in samples]
    lines = [prompt.splitlines() for prompt in prompts]
    rests = [of_one[_shared(lines) :] for of_one in lines]
    end = _shared([rest[::-1] for rest in rests])
    shown = ["\n".join(rest[: len(rest) - end]).strip() for rest in rests]
    if not all(shown) or len(set(prompts)) < 2:
        shown = prompts
    return [{**sample, "prompt": prompt} for sample, prompt in zip(samples, shown, strict=True)]


def _shared(rows: Sequence[Sequence[str]]) -> int:
    """Return how many first items all rows share."""
    return sum(1 for _ in takewhile(lambda items: len(set(items)) == 1, zip(*rows, strict=False)))


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
