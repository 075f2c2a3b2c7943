"""The journal of a collection: the outcome of every adapter, so that a new run continues where one stopped."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..adapters.peft_format import WEIGHTS
from ..adapters.writing import REPORT
from ..errors import LoraSuiteError
from ..io.dataclass_schema import record_of
from ..io.json_file import read_json
from ..io.output import resolve_folder
from ..io.paths import is_file
from ..io.schema import TEXT, check, one_of, optional
from .report import REPORT_SCHEMA

log = logging.getLogger(__name__)

JOURNAL = "journal"
SETTINGS = "collection_settings"
"""Fact in the report of a result: hash of the map and the settings that it was made with."""


@dataclass(frozen=True)
class Outcome:
    """Outcome of one adapter, a line of the journal.

    Attributes:
        adapter: The old adapter as it was given.
        status: ``"done"``, ``"failed"``, or ``"kept"`` if an earlier run has done it.
        folder: Name of its folder under ``out``.
        error: Why it failed, in one line.
        facts: Method, rank, coverage, energy kept, seconds, and what ``then`` returned.
        settings: Hash of the map and the settings; a run with others does the adapter again.
    """

    adapter: str
    status: str
    folder: str
    error: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    settings: str = ""


OUTCOME = record_of(Outcome, adapter=TEXT, error=optional(TEXT), status=one_of("done", "failed", "kept"))
"""Schema of a line."""


class Journal:
    """JSON lines, one per outcome. Every process appends to its own file and reads all of them.

    A journal that cannot be read or written is a warning: what it lacks is done again by the next run.

    Args:
        out: Folder of the results.
        index: Index of this process.
        count: Number of processes.
    """

    def __init__(self, out: Path, index: int, count: int) -> None:
        self.out = out
        self.path = out / (f"{JOURNAL}.jsonl" if count == 1 else f"{JOURNAL}-{index}.jsonl")
        self.known: dict[tuple[str, str], Outcome] = {}
        self._writable = True
        resolve_folder(out)
        for path in sorted(out.glob(f"{JOURNAL}*.jsonl")):
            if not is_file(path):
                raise LoraSuiteError("the journal must be a file", where=path, do="move the folder away")
            self._read(path)

    def _read(self, path: Path) -> None:
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            log.warning("%s: the journal cannot be read, and its adapters are done again: %s", path, error.strerror)
            return
        for line in lines:
            try:
                values = json.loads(line)
                check(values, OUTCOME, where=path.name)
                entry = Outcome(**values)
                self.known[entry.adapter, entry.settings] = entry
            except (ValueError, RecursionError):
                log.warning("ignoring a malformed line of %s, as after a crash: its adapter is done again", path.name)

    def done(self, name: str, settings: str | None, folder: str) -> Outcome | None:
        """Return the outcome of an earlier run with the same settings, if its result is still there; None otherwise.

        The settings are read from the result: the journals of several runs and shards have no common order.

        Args:
            name: The adapter.
            settings: Hash of the map and the settings; None accepts any.
            folder: Name of its folder under ``out``.
        """
        found = self._read_settings(folder)
        entry = self.known.get((name, found))
        if entry is None or entry.status != "done" or entry.folder != folder:
            return None
        if settings not in (None, found) or not (self.out / folder / WEIGHTS).is_file():
            return None
        return Outcome(name, "kept", folder, None, entry.facts, entry.settings)

    def _read_settings(self, folder: str) -> str:
        try:
            report = read_json(self.out / folder / REPORT, where=folder, schema=REPORT_SCHEMA)
        except LoraSuiteError:  # no result, or one of another tool
            return ""
        return str((report.get("facts") or {}).get(SETTINGS, ""))

    def write(self, outcome: Outcome) -> None:
        """Append a line and flush it to disk; the first failure is a warning."""
        try:
            self._append(json.dumps(asdict(outcome), ensure_ascii=False, default=str))
        except OSError as error:
            if self._writable:
                log.warning(
                    "%s: the journal cannot be written, and a new run does these adapters again: %s",
                    self.path, error.strerror,
                )  # fmt: skip
            self._writable = False

    def _append(self, line: str) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        broken = self.path.is_file() and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if broken else "") + line + "\n")
            file.flush()
            os.fsync(file.fileno())
