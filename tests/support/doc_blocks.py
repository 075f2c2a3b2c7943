"""The fenced python and bash blocks of a page, run in order: one namespace, one folder.

Run as a program (``python doc_blocks.py PAGE``) it runs one page in the current folder, in a process of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"^```(python|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: ``python`` or ``bash``, its text, and the line of the page before its first."""

    kind: str
    code: str
    line: int


def blocks(page: Path) -> list[Block]:
    """Return a page's blocks in order."""
    text = page.read_text(encoding="utf-8")
    return [Block(m[1], m[2], text.count("\n", 0, m.start(2))) for m in FENCE.finditer(text)]


def run(page: Path) -> None:
    """Run every block of a page in the current folder; the failing block's line stands in the traceback."""
    module = types.ModuleType(f"docs_{page.stem}")
    sys.modules[module.__name__] = module  # dataclasses and type hints look their module up
    for block in blocks(page):
        if block.kind == "python":
            exec(compile("\n" * block.line + block.code, str(page), "exec", dont_inherit=True), vars(module))
        else:
            run_bash(block, page)


def run_bash(block: Block, page: Path) -> None:
    """Run a bash block, which ends at the first command that fails; finds the commands of this environment first."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", block.code], env={**os.environ, "PATH": path}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise AssertionError(
            f"{page.name}, line {block.line}: code {done.returncode}\n{done.stdout}{done.stderr[-4000:]}"
        )


if __name__ == "__main__":
    run(Path(sys.argv[1]))
