"""Output folders and files that are written completely or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from ..errors import LoraSuiteError
from .exchange import exchange
from .paths import exists, is_file, is_folder
from .temporary import TemporaryFolder, remove_leftovers
from .write_errors import write_errors


def check_output(folder: str | Path, *, overwrite: bool = False, inputs: Iterable[object] = ()) -> Path:
    """Check that a folder can be written to; called before the computation and again before writing.

    What killed runs have left in and next to it is deleted.

    Args:
        folder: The output folder; symbolic links are followed.
        overwrite: Whether the folder may have files in it.
        inputs: What is read to produce the output; see `check_not_input`.

    Returns:
        The folder with ``~`` expanded.

    Raises:
        LoraSuiteError: If it cannot be a folder, has files in it and ``overwrite`` is false, contains the working
            directory, is a mount point, or is or contains an input.
    """
    path = Path(folder).expanduser()
    resolved = resolve_folder(path)
    for place in (resolved, resolved.parent):
        remove_leftovers(place)
    check_not_input(path, inputs)
    if Path.cwd().is_relative_to(resolved) or resolved.is_mount():
        raise LoraSuiteError(
            "the output is or contains the working directory, or is a mount point, and cannot be replaced",
            where=path, do="choose a folder inside it",
        )  # fmt: skip
    with write_errors(path):
        filled = is_folder(resolved) and any(resolved.iterdir())
    if filled and not overwrite:
        raise LoraSuiteError(
            "the output folder is not empty", where=path, do="choose another one, or pass overwrite=True (--overwrite)"
        )
    return path


def resolve_folder(folder: Path) -> Path:
    """Return the absolute path of a folder that exists or can be created, with symbolic links resolved.

    Raises:
        LoraSuiteError: If the path or one of its parents is a file.
    """
    if exists(folder) and not is_folder(folder):
        raise LoraSuiteError("the output is a file", where=folder, wanted="a folder", do="choose another name")
    resolved = folder.resolve()
    parent = next(path for path in (resolved, *resolved.parents) if exists(path))
    if not is_folder(parent):
        raise LoraSuiteError("a parent of the output is a file", where=folder, got=parent, do="choose another name")
    return resolved


def check_not_input(folder: str | Path, inputs: Iterable[object]) -> None:
    """Raise `LoraSuiteError` if the output folder is or contains an input: replacing it would delete the input.

    Inputs without a local path (a loaded model, None, a Hub id) are safe.
    """
    resolved = Path(folder).expanduser().resolve()
    for name in inputs:
        if not isinstance(name, (str, Path)) or not exists(name):
            continue
        if Path(name).expanduser().resolve().is_relative_to(resolved):
            raise LoraSuiteError(
                "the output is or contains an input, which it would replace", where=folder, got=name,
                wanted="a separate folder", do="choose another name",
            )  # fmt: skip


@contextmanager
def atomic_folder(folder: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder that replaces the target when the block ends without an error.

    A process that is killed leaves the previous content or the new one, and at most a hidden folder next to it, which
    the next run deletes. The same holds for a loss of power.

    Raises:
        LoraSuiteError: If the target cannot be written; see `check_output`.
    """
    target = check_output(folder, overwrite=overwrite).resolve()
    with write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    temporary = TemporaryFolder(target.parent)
    try:
        with write_errors(target, within=temporary.path):
            yield temporary.path
        check_output(target, overwrite=overwrite)  # another process may have written to it meanwhile
        with write_errors(target):
            _replace(temporary, target, overwrite=overwrite)
    finally:
        temporary.close()


def check_output_file(file: str | Path, *, overwrite: bool = False) -> Path:
    """Check that a file can be written; called before the computation.

    Args:
        file: The output file.
        overwrite: Whether it may exist.

    Returns:
        The file with ``~`` expanded.

    Raises:
        LoraSuiteError: If it is a folder or a device, or exists and ``overwrite`` is false.
    """
    target = Path(file).expanduser()
    if is_folder(target):
        raise LoraSuiteError(
            "the output is a folder", where=target, wanted="a file", do="add a file name such as report.html"
        )
    _check_replaceable(target)
    remove_leftovers(target.resolve().parent)
    if exists(target) and not overwrite:
        raise LoraSuiteError(
            "the output file exists", where=target, do="choose another, or pass overwrite=True (--overwrite)"
        )
    return target


def write_file(file: str | Path, text: str) -> None:
    """Write a text file completely or not at all; an existing one is replaced.

    Raises:
        LoraSuiteError: If it cannot be written.
    """
    target = Path(file).expanduser()
    _check_replaceable(target)
    target = target.resolve()
    with write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with closing(TemporaryFolder(target.parent)) as temporary:
            part = temporary.path / target.name
            part.write_text(text, encoding="utf-8")
            _sync(part)
            part.replace(target)
        _sync(target.parent)


def _check_replaceable(target: Path) -> None:
    """Refuse a device or a pipe, such as ``/dev/null``: it would be replaced by a file."""
    if exists(target) and not is_file(target):
        raise LoraSuiteError("the output is not a regular file", where=target, do="choose another name")


def _replace(temporary: TemporaryFolder, target: Path, *, overwrite: bool) -> None:
    """Move the new content to the target in one step; where the system cannot exchange two folders, in two."""
    for path in (temporary.path, *temporary.path.rglob("*")):
        _sync(path)
    try:
        temporary.path.rename(target)  # onto nothing or an empty folder
    except OSError:
        replaceable = target.is_dir() and temporary.path.is_dir() and (overwrite or not any(target.iterdir()))
        if not replaceable:
            raise
        if not exchange(temporary.path, target):
            temporary.old.mkdir()
            target.rename(temporary.old / target.name)
            temporary.path.rename(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    """Write a file or the entries of a folder to the disk itself, so that a loss of power does not undo a rename."""
    if path.is_dir():
        with suppress(OSError):  # not all file systems can do it for a folder
            _fsync(path)
    elif path.is_file():
        _fsync(path)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
