"""Peak anonymous memory of a command of ours: what no file on disk could give back."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

PLAIN_HEAP = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072"}
"""glibc gives freed memory back at once: what it keeps for later differs by 40 MB between two runs of one command."""


def peak(*arguments: str) -> int:
    """Run ``peft-lorasuite`` with some arguments in a process of its own; return its peak, sampled, in bytes."""
    return peak_of("-m", "peft_lorasuite", *arguments, "--quiet")


def peak_of(*arguments: str) -> int:
    """Run Python with some arguments in a process of its own; return its peak, sampled, in bytes."""
    command = [sys.executable, *arguments]
    plain = {**os.environ, **PLAIN_HEAP}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=plain) as process:
        status, most = Path(f"/proc/{process.pid}/status"), 0
        while process.poll() is None:
            held = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("RssAnon")]
            most = max(most, *map(int, held), 0)
            time.sleep(0.004)
        assert process.stderr is not None
        assert process.returncode == 0, process.stderr.read()[-2000:]
    return most * 1024
