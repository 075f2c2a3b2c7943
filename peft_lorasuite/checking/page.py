"""The page of a check: a verdict and one line per figure, as text, Markdown and JSON. Does not import torch."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .._version import __version__
from ..adapters.peft_format import WEIGHTS
from ..errors import printable
from ..io.dataclass_schema import record_of
from ..io.output import write_file
from ..io.schema import PLAIN, TEXT, ListOf, one_of, optional, table_of

PAGE, DATA = "check.md", "check.json"
"""Files of a check, beside the adapter."""
PASS, FAIL, SKIPPED = "pass", "fail", "not checked"


@dataclass(frozen=True)
class Line:
    """One figure of a check.

    Attributes:
        name: What was checked.
        status: `PASS`, `FAIL` or `SKIPPED`.
        measured: The figure, in words.
        threshold: What it must be, in words.
        reason: Why it was not checked, or what to make of it.
        value: What was compared with the threshold; None where nothing finite was measured.
    """

    name: str
    status: str
    measured: str = ""
    threshold: str = ""
    reason: str = ""
    value: float | None = None

    @classmethod
    def of(
        cls, name: str, ok: bool, measured: str, threshold: str, value: float | None = None, reason: str = ""
    ) -> Line:
        """Return a line that passes or fails; a value that is not finite is left out."""
        known = value if value is not None and math.isfinite(value) else None
        return cls(name, PASS if ok else FAIL, measured, threshold, reason, known)

    @classmethod
    def skipped(cls, name: str, reason: str, measured: str = "") -> Line:
        """Return a line that was not checked."""
        return cls(name, SKIPPED, measured, reason=reason)

    @property
    def words(self) -> str:
        """The figure with its threshold and the reason, in one clause."""
        inside = [text for text in (self.threshold, self.reason) if text]
        return f"{self.measured}{' ' if self.measured else ''}({'; '.join(inside)})" if inside else self.measured


@dataclass(frozen=True)
class UpgradeCheck:
    """The result of `check_upgrade`.

    Attributes:
        adapter: The upgraded adapter.
        base: Its backbone.
        old_adapter: The old adapter.
        old_base: Its backbone.
        lines: The figures.
        weights: SHA-256 of the adapter's weights, so that the page of other weights is not taken for theirs.
        settings: What the figures depend on: prompts, labels, limits, seed.
        version: Version of this package.
    """

    adapter: str
    base: str
    old_adapter: str
    old_base: str
    lines: tuple[Line, ...]
    weights: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    version: str = __version__

    @property
    def passed(self) -> bool:
        """Whether no line fails."""
        return all(line.status != FAIL for line in self.lines)

    @property
    def verdict(self) -> str:
        """The result and its reason, in one line."""
        failed = [line for line in self.lines if line.status == FAIL]
        skipped = sum(line.status == SKIPPED for line in self.lines)
        if failed:
            more = f", and {len(failed) - 1} more" if failed[1:] else ""
            return f"fail: {failed[0].name} {failed[0].words}{more}"
        return f"pass: {len(self.lines) - skipped} checked, {skipped} not checked"

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, the verdict first."""
        return {"passed": self.passed, "verdict": self.verdict, **asdict(self), "lines": list(map(asdict, self.lines))}

    def save(self, folder: str | Path) -> Path:
        """Write the page and its values into a folder, and return it; an older page there is replaced."""
        target = Path(folder).expanduser()
        write_file(target / DATA, json.dumps(self.to_dict(), indent=1) + "\n")
        write_file(target / PAGE, self.markdown())
        return target

    def markdown(self) -> str:
        """Return the page as Markdown."""
        lines = [f"# {_cell(self.verdict)}", "", self._subject(), ""]
        lines += ["| check | result | measured | threshold |", "|---|---|---|---|"]
        for line in self.lines:
            measured = "; ".join(text for text in (line.measured, line.reason) if text)
            lines.append("| " + " | ".join(map(_cell, (line.name, line.status, measured, line.threshold))) + " |")
        settings = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in self.settings.items())
        return "\n".join([*lines, "", f"{_cell(settings)}. peft-lorasuite {self.version}.", ""])

    def __str__(self) -> str:
        width, wide = (max(map(len, texts), default=0) for texts in self._columns())
        rows = [f"  {line.name:<{width}}  {line.status:<{wide}}  {line.words}".rstrip() for line in self.lines]
        return "\n".join([self.verdict, f"  {self._subject()}", *rows])

    def _columns(self) -> tuple[list[str], list[str]]:
        return [line.name for line in self.lines], [line.status for line in self.lines]

    def _subject(self) -> str:
        names = (self.adapter, self.base, self.old_adapter, self.old_base)
        return "{} on {}, against {} on {}".format(*map(_cell, names))


def weights_hash(folder: Path) -> str:
    """Return the SHA-256 of an adapter's weights; empty if the folder has none."""
    path = folder / WEIGHTS
    found = hashlib.sha256()
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        while part := file.read(2**20):
            found.update(part)
    return found.hexdigest()


def _cell(text: str) -> str:
    """Return a text for a cell of a table: on one line, and without a bar."""
    return printable(" ".join(text.split())).replace("|", "/")


_line = replace(
    record_of(
        Line, name=TEXT, status=one_of(PASS, FAIL, SKIPPED), measured=TEXT, threshold=TEXT, reason=TEXT
    ), others=PLAIN,
)  # fmt: skip
CHECK_SCHEMA = replace(
    record_of(
        UpgradeCheck, adapter=TEXT, base=TEXT, old_adapter=TEXT, old_base=TEXT, weights=TEXT, version=TEXT,
        lines=ListOf(item=_line), settings=optional(table_of(PLAIN)),
    ), others=PLAIN,
)  # fmt: skip
"""Schema of ``check.json``."""
