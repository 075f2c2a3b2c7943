"""Output folders that are written completely or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..errors import LoraSuiteError
from .paths import exists, is_folder

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
"""Error codes of a write that failed on an open file; such errors have no file name."""


def check_output(folder: str | Path, *, overwrite: bool = False, inputs: Iterable[object] = ()) -> Path:
    """Check that a folder can be written to; called before the computation and again before writing.

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
    check_not_input(path, inputs)
    if Path.cwd().is_relative_to(resolved) or resolved.is_mount():
        raise LoraSuiteError(
            "the output is or contains the working directory, or is a mount point, and cannot be replaced",
            where=path, do="choose a folder inside it",
        )  # fmt: skip
    with write_errors(path):
        filled = is_folder(resolved) and any(resolved.iterdir())
    if filled and not overwrite:
        raise LoraSuiteError("the output folder is not empty", where=path, do="choose another one, or pass --overwrite")
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

    A process that is killed leaves at most a hidden ``.NAME.*.part`` folder next to the target, never an incomplete
    target.

    Raises:
        LoraSuiteError: If the target cannot be written; see `check_output`.
    """
    target = check_output(folder, overwrite=overwrite).resolve()
    with write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    try:
        part.chmod(0o755)
        try:
            yield part
        except (OSError, SafetensorError) as error:
            if not _is_write_error(error, part):
                raise
            raise _write_error(target, error) from error
        check_output(target, overwrite=overwrite)  # another process may have written to it meanwhile
        with write_errors(target):
            _replace(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def write_errors(target: str | Path) -> Iterator[None]:
    """Turn errors such as a full disk or missing permissions into `LoraSuiteError`; safetensors has its own class."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise _write_error(Path(target), error) from error


def _replace(part: Path, target: Path) -> None:
    for file in part.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    if not target.is_dir():
        part.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    backup = old / target.name
    try:
        target.rename(backup)
        part.rename(target)
    except BaseException:
        _restore(backup, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _restore(backup: Path, target: Path) -> None:
    try:
        if backup.is_dir():
            backup.rename(target)
        backup.parent.rmdir()
    except OSError as error:
        raise LoraSuiteError(
            f"nothing was written, and the previous content cannot be restored: {error.strerror}",
            where=target, do=f"move it back from {backup.parent}",
        ) from error  # fmt: skip


def _is_write_error(error: Exception, part: Path) -> bool:
    """Whether an error comes from writing to ``part``, and not from a file that is read or from the network."""
    names = [str(name) for name in (getattr(error, "filename", None), getattr(error, "filename2", None)) if name]
    if names:
        return any(Path(name).is_relative_to(part) for name in names)
    return isinstance(error, SafetensorError) or getattr(error, "errno", None) in FULL


def _write_error(target: Path, error: Exception) -> LoraSuiteError:
    return LoraSuiteError(
        f"nothing was written: {getattr(error, 'strerror', None) or error}",
        where=target,
        do="check the free space and the permissions, then run it again",
    )
