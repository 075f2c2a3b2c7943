"""Starting a program in two processes on the CPU, as a user starts it: through accelerate's launcher."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from patience import limit

QUIET = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def launched(*words: Any, fsdp: bool = False) -> subprocess.CompletedProcess[str]:
    """Run ``-m module ...`` or ``program.py ...`` in two processes."""
    kind = ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
    call = [
        sys.executable, "-m", "accelerate.commands.launch", *(kind if fsdp else ["--multi_gpu"]),
        "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
        "--main_process_port", str(free_port()), *map(str, words),
    ]  # fmt: skip
    longest = limit(280)
    return subprocess.run(
        call, capture_output=True, text=True, env={**os.environ, **QUIET}, timeout=longest, check=False
    )


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def program(folder: Path, text: str) -> Path:
    """Write a small program to launch."""
    path = folder / "program.py"
    path.write_text(text)
    return path
