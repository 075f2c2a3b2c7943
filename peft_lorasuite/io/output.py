"""Output that appears whole or not at all."""

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
"""What the system says of a handle that takes no more; it names no file then."""


def check_output(folder: str | Path, *, overwrite: bool = False, inputs: Iterable[object] = ()) -> Path:
    """Return the folder to write to, or refuse: called before the work as well as before the writing.

    Args:
        folder: Where to; a link stands for what it points to.
        overwrite: Whether it may hold something.
        inputs: What the work reads: a folder that is one of them, or holds one, is not written to.
    """
    path = Path(folder).expanduser()
    place = resolve_folder(path)
    check_not_input(path, inputs)
    if Path.cwd().is_relative_to(place) or place.is_mount():
        raise LoraSuiteError(
            "the output is the working directory, holds it, or is a mount point, and cannot be replaced whole",
            where=path, do="name a folder in it",
        )  # fmt: skip
    with write_errors(path):
        filled = is_folder(place) and any(place.iterdir())
    if filled and not overwrite:
        raise LoraSuiteError(
            "the output folder is not empty", where=path, do="choose another, or allow it with --overwrite"
        )
    return path


def resolve_folder(folder: Path) -> Path:
    """Return where a folder is or can be made, links followed; refuse what is a file or lies below one."""
    if exists(folder) and not is_folder(folder):
        raise LoraSuiteError("the output is a file", where=folder, wanted="a folder", do="choose another name")
    place = folder.resolve()
    above = next(one for one in (place, *place.parents) if exists(one))
    if not is_folder(above):
        raise LoraSuiteError("the output lies below a file", where=folder, got=above, do="choose another name")
    return place


def check_not_input(folder: str | Path, inputs: Iterable[object]) -> None:
    """Refuse an output that is an input's folder or holds it: replacing it would destroy the input.

    Inputs that are no names (a loaded model, None) or lie on the Hub cannot be hit.
    """
    place = Path(folder).expanduser().resolve()
    for name in inputs:
        if not isinstance(name, (str, Path)) or not exists(name):
            continue
        if Path(name).expanduser().resolve().is_relative_to(place):
            raise LoraSuiteError(
                "the output is an input or holds one, which it would replace", where=folder, got=name,
                wanted="a folder of its own", do="choose another name",
            )  # fmt: skip


@contextmanager
def atomic_folder(folder: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give an empty folder beside the target; it takes the target's place when the block ends without an error.

    A killed process leaves at most a hidden ``.NAME.*.part`` folder beside the target, never a half-written target.
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
        check_output(target, overwrite=overwrite)  # it may have been filled since
        with write_errors(target):
            _replace(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def write_errors(target: str | Path) -> Iterator[None]:
    """Turn a full disk or missing rights into an error that says so; safetensors reports them in a kind of its own."""
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
    kept = old / target.name
    try:
        target.rename(kept)
        part.rename(target)
    except BaseException:
        _restore(kept, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _restore(kept: Path, target: Path) -> None:
    try:
        if kept.is_dir():
            kept.rename(target)
        kept.parent.rmdir()
    except OSError as error:
        raise LoraSuiteError(
            f"nothing was written, and what was there before cannot be put back: {error.strerror}",
            where=target, do=f"it is in {kept.parent}: move it back",
        ) from error  # fmt: skip


def _is_write_error(error: Exception, part: Path) -> bool:
    """Whether an error of the block is about what it writes, and not about a file that it reads, or a network."""
    names = [str(name) for name in (getattr(error, "filename", None), getattr(error, "filename2", None)) if name]
    if names:
        return any(Path(name).is_relative_to(part) for name in names)
    return isinstance(error, SafetensorError) or getattr(error, "errno", None) in FULL


def _write_error(target: Path, error: Exception) -> LoraSuiteError:
    return LoraSuiteError(
        f"nothing was written: {getattr(error, 'strerror', None) or error}",
        where=target,
        do="check free space and rights, then run it again",
    )
