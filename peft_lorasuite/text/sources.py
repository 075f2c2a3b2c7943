"""Streams of records from files, datasets and lists, of which a limited number is drawn; no file is read whole."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import LoraSuiteError, short_message
from ..io.paths import is_file

CHUNK = 2**20
"""Characters of a JSON list that are read at once."""
LARGEST_OBJECT = 2**27
"""Bytes at most of a file that has one JSON object over several lines."""
SHUFFLE_BUFFER = 10_000
"""Records of a Hub dataset among which each one is drawn: reading all of them would download the dataset."""
BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", {}), ".tsv": ("csv", {"sep": "\t"}), ".parquet": ("parquet", {}),
}  # fmt: skip
"""File suffix -> builder of `datasets` and its options."""
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson", ".txt")
SEPARATOR = re.compile(r"\s*(,)?\s*(\])?")
HUB_DATASET = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[^/\\:]+)(?=:))?(:(?P<split>[^/\\:]+))?")


@dataclass(frozen=True, eq=False)
class Stream:
    """Records that are read one after the other.

    Attributes:
        name: Name of the source, for messages.
        items: The records, possibly not parsed yet.
        parse: Parses an item, if the items are not parsed; only called for drawn records.
    """

    name: str
    items: Iterable[Any]
    parse: Callable[[Any], Any] | None = None

    def draw(self, limit: int | None, seed: int) -> list[tuple[int, Any]]:
        """Return records with their numbers, starting at 1: all, or ``limit`` of them drawn by reservoir sampling."""
        drawn: list[tuple[int, Any]] = []
        generator = random.Random(seed)
        for number, item in enumerate(self.items, 1):
            if limit is None or number <= limit:
                drawn.append((number, item))
            elif (slot := int(generator.random() * number)) < limit:
                drawn[slot] = (number, item)
        drawn.sort(key=lambda one: one[0])
        if not drawn:
            raise LoraSuiteError("has no records", where=self.name, wanted="at least one")
        return [(number, self.parse(item) if self.parse else item) for number, item in drawn]


def open_stream(
    source: Any, *, text_lines: bool = False, limit: int | None = None, seed: int = 0, token: str | bool | None = None
) -> Stream:
    """Open a source of records.

    Args:
        source: A file (JSON, JSON Lines, CSV, TSV, Parquet, or text with one record per line), a Hub dataset
            (``owner/name``, ``owner/name:split`` or ``owner/name:config:split``; by default the split ``train``), a
            `datasets.Dataset` or `datasets.IterableDataset`, a table of pandas, or an iterable of records.
        text_lines: Whether a ``.txt`` file has one record per line.
        limit: How many records will be drawn; a Hub dataset is only read as far as it takes.
        seed: Seed of the order in which a Hub dataset is read.
        token: Hub token.

    Raises:
        LoraSuiteError: If there is no such file or dataset, or it is not a collection of records.
    """
    if isinstance(source, (str, Path)):
        return _open_name(str(source), text_lines, limit, seed, token)
    if hasattr(source, "to_dict") and hasattr(source, "iloc"):  # a table or a column of pandas
        source = source.to_dict("records") if hasattr(source, "columns") else source.tolist()
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise LoraSuiteError(
            "the data must be a collection of records", got=type(source).__name__,
            wanted="a file, a datasets.Dataset or a list",
            do="pass one split of a DatasetDict" if isinstance(source, Mapping) else None,
        )  # fmt: skip
    if isinstance(source, Sequence) or (hasattr(source, "column_names") and hasattr(source, "__len__")):
        table: Any = source
        return Stream("the data", range(len(table)), table.__getitem__)
    return Stream("the data", source)


def _open_name(name: str, text_lines: bool, limit: int | None, seed: int, token: str | bool | None) -> Stream:
    path = Path(name).expanduser()
    suffix = path.suffix.lower()
    dataset = HUB_DATASET.fullmatch(name)
    if dataset and not is_file(path) and suffix not in (*BUILDERS, *JSON_SUFFIXES):
        records = _load_dataset(
            name, dataset["name"], split=dataset["split"], limit=limit, seed=seed, token=token,
            **({"name": dataset["config"]} if dataset["config"] else {}),
        )  # fmt: skip
        return Stream(name, records)
    if not is_file(path):
        wanted = "JSON, JSON Lines, CSV or Parquet, or the Hub id of a dataset (owner/name)"
        what = "a folder, not a file" if path.is_dir() else "file not found"
        raise LoraSuiteError(what, where=path, wanted=wanted, do="check the name")
    if suffix in BUILDERS:
        builder, options = BUILDERS[suffix]
        return Stream(path.name, _load_dataset(name, builder, data_files=str(path), **options))
    if text_lines and suffix == ".txt":
        return Stream(path.name, _text_lines(path))
    do = "fix the line or export the file again"
    if text_lines:
        do += "; a plain text file with one prompt per line must end in .txt"
    return _open_json(path, do)


def _load_dataset(
    where: str, path: str, *, split: str | None = None, limit: int | None = None, seed: int = 0, **options: Any
) -> Iterator[Any]:
    """Yield the records of a dataset, streamed by `datasets`."""
    from datasets import load_dataset

    try:
        dataset = load_dataset(path, split=split or "train", streaming=True, **options)
        if "data_files" not in options and limit is not None:
            dataset = dataset.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER).take(limit)
        yield from dataset
    except Exception as error:  # every format has errors of its own
        raise LoraSuiteError(
            f"the dataset cannot be read: {short_message(error)}",
            where=where,
            do="check the name, the config and the split (owner/name:config:split), or the file",
        ) from error


def _text_lines(path: Path) -> Iterator[str]:
    with _reading(path), path.open(encoding="utf-8-sig") as file:  # splitlines would also split at U+2028 and others
        yield from (line.rstrip("\n") for line in file if not line.isspace())


def _open_json(path: Path, do: str) -> Stream:
    with _reading(path), path.open("rb") as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
        file.seek(0)
        if start == b"[":
            return Stream(path.name, _list_items(path, do))
        first = next((line for line in file if not line.isspace()), b"null")
        is_object = isinstance(_loads(first), (dict, str))
        if not is_object and path.stat().st_size <= LARGEST_OBJECT:
            file.seek(0)
            value = _loads(file.read())
            if isinstance(value, dict):
                return Stream(path.name, [value])
            if not isinstance(value, ValueError | RecursionError):
                if not start:
                    return Stream(path.name, [])
                raise LoraSuiteError(
                    "the file has no records", where=path, got=type(value).__name__, wanted="a JSON list"
                )
    return Stream(path.name, _numbered_lines(path), lambda line: _parse(line[1], f"{path}, line {line[0]}", do, path))


def _numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with _reading(path), path.open("rb") as file:
        yield from ((number, line) for number, line in enumerate(file, 1) if not line.isspace())


def _list_items(path: Path, do: str) -> Iterator[Any]:
    """Yield the items of a JSON list, of which only the part that is being parsed is in memory."""
    decoder, size, first, problem = json.JSONDecoder(), CHUNK, True, "the list does not end"
    with _reading(path), path.open(encoding="utf-8-sig") as file:
        text = file.read(size)
        at = text.index("[") + 1
        while True:
            before = SEPARATOR.match(text, at)
            comma, closed = before.groups() if before else (None, None)
            if closed and not comma:
                rest = text[before.end() :] + file.read() if before else ""
                if rest.strip():
                    raise _not_json(str(path), "text after the list", do)
                return
            start = before.end() if before else at
            if start < len(text):
                if bool(comma) is first or closed:
                    raise _not_json(str(path), "a comma is missing or not followed by an item", do)
                try:
                    value, end = decoder.raw_decode(text, start)
                    problem = "the list does not end"
                except RecursionError as error:
                    raise _not_json(str(path), error, do) from error
                except ValueError as error:
                    problem, value, end = str(error), None, len(text)
                if end < len(text):  # a number at the end of the text may go on
                    yield value
                    at, size, first = end, CHUNK, False
                    continue
            more = file.read(size)
            if not more:
                raise _not_json(str(path), problem, do)
            text, at, size = text[at:] + more, 0, 2 * size


def _loads(data: bytes) -> Any:
    """Parse JSON; return the error where it is none."""
    try:
        return json.loads(data.removeprefix(b"\xef\xbb\xbf"))
    except (ValueError, RecursionError) as error:
        return error


def _parse(data: bytes, where: str, do: str, path: Path) -> Any:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _unreadable(path, error) from error
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _not_json(where, error, do) from error


def _not_json(where: str, problem: object, do: str) -> LoraSuiteError:
    return LoraSuiteError(f"the file is neither JSON nor JSON Lines ({problem})", where=where, do=do)


def _unreadable(path: Path, error: Exception) -> LoraSuiteError:
    return LoraSuiteError(f"the file cannot be read: {error}", where=path, wanted="text in UTF-8")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error
