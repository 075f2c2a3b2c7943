"""What became of every adapter of a collection, kept beside the results: a new run goes on where one stopped."""

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
from ..io.output import resolve_folder
from ..io.paths import is_file
from ..io.source import read_json

log = logging.getLogger(__name__)

JOURNAL = "journal"
SETTINGS = "collection_settings"
"""Fact of a result's report: the digest of map and settings that it was made with."""


@dataclass(frozen=True)
class Outcome:
    """What became of one adapter; a line of the journal.

    Attributes:
        adapter: The old adapter as it was named.
        status: ``"done"``, ``"failed"``, or ``"kept"``: done by an earlier run.
        folder: Its folder under ``out``.
        error: Why it failed, in one sentence.
        facts: Method, rank, coverage, energy kept, seconds, and what ``then`` returned.
        settings: Digest of map and settings: a run with others does not take this for done.
    """

    adapter: str
    status: str
    folder: str
    error: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    settings: str = ""


class Journal:
    """Lines of JSON, one an outcome, appended as they come; one file a process, all of them read."""

    def __init__(self, out: Path, index: int, count: int) -> None:
        self.out = out
        self.path = out / (f"{JOURNAL}.jsonl" if count == 1 else f"{JOURNAL}-{index}.jsonl")
        self.known: dict[tuple[str, str], Outcome] = {}
        resolve_folder(out)
        for path in sorted(out.glob(f"{JOURNAL}*.jsonl")):
            if not is_file(path):
                raise LoraSuiteError("the journal is no file", where=path, do="move it away")
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    entry = Outcome(**json.loads(line))
                    self.known[entry.adapter, entry.settings] = entry
                except (ValueError, TypeError):
                    log.warning("a line of %s cannot be read, as after a crash: that adapter is done again", path.name)

    def done(self, name: str, settings: str | None, folder: str) -> Outcome | None:
        """Return what an earlier run did; None if nothing, with other settings, or if it is no longer there.

        The result itself says with what settings it was made: the files of several runs and shards have no order.
        """
        held = self._held(folder)
        entry = self.known.get((name, held))
        if entry is None or entry.status != "done" or entry.folder != folder:
            return None
        if settings not in (None, held) or not (self.out / folder / WEIGHTS).is_file():
            return None
        return Outcome(name, "kept", folder, None, entry.facts, entry.settings)

    def _held(self, folder: str) -> str:
        try:
            return str(read_json(self.out / folder / REPORT, where=folder)["facts"][SETTINGS])
        except (LoraSuiteError, KeyError, TypeError):  # no result, or none that says it
            return ""

    def write(self, outcome: Outcome) -> None:
        """Append a line, at once and for good."""
        self.out.mkdir(parents=True, exist_ok=True)
        line = json.dumps(asdict(outcome), ensure_ascii=False)
        broken = self.path.is_file() and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if broken else "") + line + "\n")
            file.flush()
            os.fsync(file.fileno())
