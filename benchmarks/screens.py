"""What a terminal of 80 columns shows after the commands of a first session, as text.

    python benchmarks/screens.py -o FOLDER          # of this checkout; needs `pip install pyte`
    python benchmarks/screens.py --code CHECKOUT -o FOLDER

The commands run in a pseudo-terminal, in a folder that has the demo pair (``old``, ``new``, ``adapter`` and
``prompts.json``). ``--code`` runs another checkout, to compare two states of the code.
"""

from __future__ import annotations

import argparse
import os
import pty
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pyte

ROOT = Path(__file__).parent.parent
COLUMNS, LINES, MOST = 80, 50, 100_000
SIDES = "--from old --to new"
COMMANDS = {
    "no-command": "",
    "mistyped": "upgarde adapter",
    "help-upgrade": "upgrade --help",
    "families": "families",
    "upgrade-lorasuite": f"upgrade adapter {SIDES} --method lorasuite -o by-weights",
    "upgrade-transplant": f"upgrade adapter {SIDES} --method transplant --prompts prompts.json -o last-layer",
    "upgrade-distill": f"upgrade adapter {SIDES} --method distill --prompts prompts.json --set length=8 -o trained",
    "no-such-prompts": f"upgrade adapter {SIDES} --method distill --prompts promts.json -o other",
}
"""Screen -> arguments of peft-lorasuite."""


def screen(words: list[str], folder: Path, code: Path) -> str:
    """Run a command in a terminal; return what the terminal shows afterwards, what scrolled away included."""
    shown = pyte.HistoryScreen(COLUMNS, LINES, history=MOST)
    shown.set_mode(pyte.modes.LNM)
    stream = pyte.ByteStream(shown)
    ours, theirs = pty.openpty()
    environment = {
        **os.environ, "PYTHONPATH": str(code), "COLUMNS": str(COLUMNS), "TERM": "xterm-256color",
        "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    call = [sys.executable, "-m", "peft_lorasuite", *words]
    process = subprocess.Popen(
        call, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, close_fds=True
    )
    os.close(theirs)
    while True:
        try:
            read = os.read(ours, 65536)
        except OSError:  # Linux: the other end was closed
            break
        if not read:
            break
        stream.feed(read)
    os.close(ours)
    code_of_exit = process.wait()
    above = ["".join(line[column].data for column in range(COLUMNS)) for line in shown.history.top]
    lines = [line.rstrip() for line in [*above, *shown.display]]
    text = "\n".join(lines).rstrip()
    return f"$ peft-lorasuite {' '.join(words)}".rstrip() + f"\n{text}\n[exit code {code_of_exit}]\n"


def main() -> None:
    """Run the commands and write a file for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--code", type=Path, default=ROOT, help="checkout to run (default: this one)")
    parser.add_argument("--screens", default=",".join(COMMANDS), help="comma-separated; all by default")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the text files")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    code = args.code.resolve()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        shutil.copytree(code / "peft_lorasuite" / "data" / "demo", folder, dirs_exist_ok=True)
        for name in args.screens.split(","):
            text = screen(COMMANDS[name].split(), folder, code).replace(str(folder), ".")
            (args.output / f"{name}.txt").write_text(text, encoding="utf-8")
            print(text)


if __name__ == "__main__":
    main()
