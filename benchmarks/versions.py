"""Run the tests with the installed versions of all libraries, and write a row of the table in docs/versions.md.

    python benchmarks/versions.py                  # the default tests
    python benchmarks/versions.py tests/compat     # a part of them: the row says which

Run it once in the environment of every set of versions; `make lowest` is that of the lowest ones.
"""

from __future__ import annotations

import argparse
import platform
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "versions.md"
LIBRARIES = (
    "torch", "transformers", "peft", "huggingface-hub", "datasets", "accelerate", "safetensors", "tokenizers", "trl",
)  # fmt: skip
HEADER = f"| Python | {' | '.join(LIBRARIES)} | tests | passed | failed | skipped |"


def run_tests(words: list[str], workers: int) -> dict[str, int]:
    """Run pytest and return the counts of its report."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-m", "not slow", "-q", "-n", str(workers), "--dist", "loadfile", f"--junitxml={report}"]
        subprocess.run([sys.executable, "-m", "pytest", *options, *words], cwd=ROOT, check=False)
        suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    total, skipped = int(suite.attrib["tests"]), int(suite.attrib["skipped"])
    failed = int(suite.attrib["failures"]) + int(suite.attrib["errors"])
    return {"passed": total - skipped - failed, "failed": failed, "skipped": skipped}


def row(words: list[str], counts: dict[str, int]) -> str:
    """Return the row of this environment."""
    versions = [version(name).partition("+")[0] for name in LIBRARIES]
    which = ", ".join(word.removeprefix("tests/") for word in words) or "all"
    return f"| {' | '.join([platform.python_version(), *versions, which, *map(str, counts.values())])} |"


def write(line: str) -> None:
    """Replace the row of the same versions and tests, or add one; rows go by version."""
    text = PAGE.read_text(encoding="utf-8")
    table = re.search(rf"{re.escape(HEADER)}\n(\|[-:|]+\n)((?:\|.*\n)*)", text)
    if table is None:
        raise SystemExit(f"{PAGE} has no table with the header {HEADER}")
    key = line.rsplit(" | ", 3)[0]
    rows = [one for one in table[2].splitlines() if not one.startswith(f"{key} |")]
    rows = sorted([*rows, line], key=lambda one: [int(part) for part in re.findall(r"\d+", one)])
    body = "".join(f"{one}\n" for one in rows)
    PAGE.write_text(f"{text[: table.start(2)]}{body}{text[table.end(2) :]}", encoding="utf-8")


def main() -> int:
    """Run the tests, write the row, and return 1 if a test failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="*", help="files or folders of tests; by default all")
    parser.add_argument("--workers", type=int, default=2, help="processes (2)")
    args = parser.parse_args()
    counts = run_tests(args.tests, args.workers)
    line = row(args.tests, counts)
    write(line)
    print(line)
    return int(counts["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
