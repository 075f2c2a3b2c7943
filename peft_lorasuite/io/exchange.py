"""Swapping two paths in one step, which Python's `os` cannot do."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

AT_FDCWD = -100
RENAME_EXCHANGE, RENAME_SWAP = 2, 2
UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}
"""Error codes of a kernel, a file system or a sandbox without the call."""


def exchange(one: Path, other: Path) -> bool:
    """Swap two files or folders of one file system atomically: at any time both names exist.

    Returns:
        Whether they were swapped; False where the system or the file system cannot do it.

    Raises:
        OSError: If it fails for another reason.
    """
    paths = os.fsencode(one), os.fsencode(other)
    libc: Any = None if os.name == "nt" else ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):  # Linux
        call = partial(libc.renameat2, AT_FDCWD, paths[0], AT_FDCWD, paths[1], RENAME_EXCHANGE)
    elif hasattr(libc, "renamex_np"):  # macOS
        call = partial(libc.renamex_np, *paths, RENAME_SWAP)
    else:
        return False
    sys.audit("os.rename", one, other, -1, -1)  # as `os.rename` does
    if call() == 0:
        return True
    code = ctypes.get_errno()
    if code in UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))
