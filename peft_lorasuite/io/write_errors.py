"""Errors of writing files, such as a full disk or missing permissions, as `LoraSuiteError`."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..errors import LoraSuiteError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
"""Error codes of a write that failed on an open file; such errors have no file name."""


@contextmanager
def write_errors(target: str | Path, *, within: Path | None = None) -> Iterator[None]:
    """Turn the errors of writing into `LoraSuiteError`; safetensors has its own class of them.

    Args:
        target: What is written, for the message.
        within: The folder that is written to, where the block may read other files too: errors that do not come from
            writing to it are left as they are.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if within is not None and not _is_write_error(error, within):
            raise
        raise LoraSuiteError(
            f"nothing was written: {getattr(error, 'strerror', None) or error}",
            where=target, do="check the free space and the permissions, then run it again",
        ) from error  # fmt: skip


def _is_write_error(error: Exception, folder: Path) -> bool:
    """Whether an error comes from writing to a folder, and not from a file that is read or from the network."""
    names = [str(name) for name in (getattr(error, "filename", None), getattr(error, "filename2", None)) if name]
    if names:
        return any(Path(name).is_relative_to(folder) for name in names)
    return isinstance(error, SafetensorError) or getattr(error, "errno", None) in FULL
