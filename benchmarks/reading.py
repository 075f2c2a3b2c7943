"""Time and memory of drawing prompts from a large file of conversations in JSON Lines.

    python benchmarks/reading.py --work FOLDER --out FILE.json [--gigabytes 5]

The file is written to the work folder and removed at the end. Each row is a process of its own: ``imports`` starts and
imports the package, ``bytes`` reads every line, ``json`` parses every line as well, and ``prompts`` draws 128 prompts
with `read_prompts`. Peak memory is anonymous memory; ``more`` is that of a row beyond ``imports``.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from common import GB, machine, watch, write_json

WORDS = (
    "the",
    "order",
    "of",
    "my",
    "sister",
    "came",
    "late",
    "and",
    "a",
    "part",
    "is",
    "missing",
    "can",
    "you",
    "help",
)
IMPORTS = "import json, sys; from peft_lorasuite.text.examples import read_prompts; "
ROWS = {
    "imports": "",
    "bytes": "print(sum(len(line) for line in open(sys.argv[1], 'rb')))",
    "json": "print(sum(len(json.loads(line)) for line in open(sys.argv[1], 'rb')))",
    "prompts": "print(len(read_prompts(sys.argv[1], limit=128)))",
}
"""Row -> what its process runs after the imports."""


def write_conversations(path: Path, size: int) -> int:
    """Write conversations of one to four exchanges until the file has a size in bytes; return how many."""
    source, count, written = random.Random(0), 0, 0

    def text(most: int) -> str:
        return " ".join(source.choices(WORDS, k=source.randint(5, most)))

    blocks = []
    for _ in range(2000):  # drawing every text would take longer than all rows
        turns = [("user", 120), ("assistant", 300)] * source.randint(1, 4)
        messages = [{"role": "system", "content": text(40)}, *({"role": r, "content": text(n)} for r, n in turns)]
        blocks.append(messages)
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            line = json.dumps({"id": count, "messages": blocks[count % len(blocks)]})
            written += file.write(line + "\n")
            count += 1
    return count


def table(found: dict[str, Any]) -> str:
    """Return the rows as Markdown."""
    own = found["rows"]["imports"]
    lines = ["| row | seconds | of reading the bytes | of parsing | peak MB more |", "|---|---:|---:|---:|---:|"]
    spent = {name: row["seconds"] - own["seconds"] for name, row in found["rows"].items() if name != "imports"}
    for name, seconds in spent.items():
        more = 1000 * (found["rows"][name]["peak_gb"] - own["peak_gb"])
        shares = [f"{seconds / spent[other]:.2f}" for other in ("bytes", "json")]
        lines.append(f"| {' | '.join([name, f'{seconds:.1f}', *shares, f'{more:.0f}'])} |")
    return "\n".join(lines)


def main() -> None:
    """Write the file, measure the rows, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, type=Path, help="folder for the file")
    parser.add_argument("--out", required=True, type=Path, help="JSON with the figures")
    parser.add_argument("--gigabytes", type=float, default=5.0, help="size of the file (default: 5)")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    path = args.work / "conversations.jsonl"
    try:
        count = write_conversations(path, int(args.gigabytes * GB))
        rows = {name: watch(["-c", IMPORTS + call, str(path)]) for name, call in ROWS.items()}
        found = {"bytes": path.stat().st_size, "conversations": count, "rows": rows, "machine": machine()}
    finally:
        path.unlink(missing_ok=True)
    write_json(args.out, found)
    args.out.with_suffix(".md").write_text(table(found) + "\n", encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
