"""Temporary folders that are locked while they are used; the next run deletes those of killed runs."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from ..errors import LoraSuiteError
from .write_errors import write_errors

log = logging.getLogger(__name__)

PREFIX = "peft-lorasuite-"
HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
"""This machine in the names of folders: on some shared file systems a lock is seen on one machine only."""
NAME = re.compile(rf"\.?{PREFIX}([0-9a-f]{{8}})-[0-9a-z_]{{8}}")
LOCK, NEW, OLD = "lock", "new", "old"
"""What such a folder has in it: the lock, what is being written, and an output that was moved away."""
UNLOCKED = "unlocked"
"""Marks a folder on a file system without locks, which is never taken for a leftover."""
OTHER_HOST_DAYS = 7
"""Days without a change after which a folder of another machine is taken for a leftover."""


class TemporaryFolder:
    """A folder for one writer, locked until it is closed or the process ends.

    Args:
        parent: Where it is created, as a hidden folder; by default the system's folder for temporary files.

    Attributes:
        path: The empty folder to write to.
        old: Where an output can be moved that is about to be replaced; not created yet.

    Raises:
        LoraSuiteError: If it cannot be created.
    """

    def __init__(self, parent: Path | None = None) -> None:
        with write_errors(parent or "the folder for temporary files"):
            place = Path(tempfile.gettempdir()) if parent is None else parent
            remove_leftovers(place)
            prefix = f"{'' if parent is None else '.'}{PREFIX}{HOST}-"
            self._root, self._lock = _create(prefix, place)
            self.path, self.old = self._root / NEW, self._root / OLD
            self.path.mkdir()

    def close(self) -> None:
        """Delete the folder; an output that was moved away and not replaced is moved back first.

        Raises:
            LoraSuiteError: If it cannot be moved back.
        """
        try:
            _restore(self._root)
        except OSError as error:
            raise LoraSuiteError(
                f"nothing was written, and the previous content cannot be restored: {error.strerror}",
                where=self._root.parent, do=f"move it back from {self.old}",
            ) from error  # fmt: skip
        else:
            _delete(self._root)
        finally:
            if self._lock is not None:
                self._lock.release()


@contextmanager
def temporary_folder(parent: Path | None = None) -> Iterator[Path]:
    """Yield an empty folder, by default in the system's folder for temporary files, and delete it afterwards.

    Raises:
        LoraSuiteError: If it cannot be created, or writing to it fails.
    """
    folder = TemporaryFolder(parent)
    try:
        with write_errors(folder.path, within=folder.path):
            yield folder.path
    finally:
        folder.close()


def remove_leftovers(place: Path) -> None:
    """Delete the temporary folders of killed runs in a folder; an output that one had moved away is moved back.

    Folders that are locked, or that the package has not created for this user, stay. Errors are not raised.
    """
    with suppress(OSError), os.scandir(place) as entries:
        for root in [Path(entry) for entry in entries if NAME.fullmatch(entry.name)]:
            with suppress(OSError, NotImplementedError):
                _remove_if_left(root)


def _remove_if_left(root: Path) -> None:
    lock = _acquire(root) if _is_ours(root) else None
    if lock is None:
        return
    try:
        for target in _restore(root):
            log.warning("%s: restored; a run was killed while it replaced it", target)
        _delete(root)
    finally:
        lock.release()


def _is_ours(root: Path) -> bool:
    """Whether the package has created a folder for this user; one of another machine must be old as well."""
    if root.is_symlink() or not root.is_dir() or {path.name for path in root.iterdir()} - {LOCK, NEW, OLD}:
        return False
    if hasattr(os, "getuid") and root.stat().st_uid != os.getuid():
        return False
    found = NAME.fullmatch(root.name)
    if found is not None and found[1] == HOST:
        return True
    changed = max(path.lstat().st_mtime for path in (root, *root.rglob("*")))
    return time.time() - changed > OTHER_HOST_DAYS * 24 * 3600


def _create(prefix: str, place: Path) -> tuple[Path, BaseFileLock | None]:
    """Create a folder and lock it; the lock is None on a file system without locks."""
    while True:
        root = Path(tempfile.mkdtemp(prefix=prefix, dir=place))
        try:
            lock = _acquire(root)
        except (OSError, NotImplementedError):
            (root / UNLOCKED).touch()
            return root, None
        if lock is not None:  # else another process has taken the folder, not locked yet, for a leftover
            return root, lock


def _acquire(root: Path) -> BaseFileLock | None:
    """Lock a folder; None if another process has locked or deleted it.

    Raises:
        OSError: If the file system has no locks.
    """
    lock = FileLock(root / LOCK, timeout=0, thread_local=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # filelock warns where it replaces a lock of the system by a file
        try:
            lock.acquire()
        except (Timeout, FileNotFoundError, FileExistsError):  # the last: deleted while filelock looked for it
            return None
    if (root / LOCK).exists():
        return lock
    lock.release()
    return None


def _restore(root: Path) -> list[Path]:
    """Move an output back that was moved away, unless there is a new one; return what was moved back."""
    moved = list((root / OLD).iterdir()) if (root / OLD).is_dir() else []
    lost = [path for path in moved if not os.path.lexists(root.parent / path.name)]
    return [path.rename(root.parent / path.name) for path in lost]


def _delete(root: Path) -> None:
    """Delete a folder, with the lock last: until then it can be recognized as a leftover."""
    for path in (root / OLD, root / NEW, root):
        shutil.rmtree(path, ignore_errors=True)
