"""Peak anonymous memory of a command of ours: what no file on disk could give back."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path


def peak(*arguments: str) -> int:
    """Run ``peft-lorasuite`` with some arguments in a process of its own; return its peak, sampled, in bytes."""
    command = [sys.executable, "-m", "peft_lorasuite", *arguments, "--quiet"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        status, most = Path(f"/proc/{process.pid}/status"), 0
        while process.poll() is None:
            held = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("RssAnon")]
            most = max(most, *map(int, held), 0)
            time.sleep(0.004)
        assert process.stderr is not None
        assert process.returncode == 0, process.stderr.read()[-2000:]
    return most * 1024
