"""Put the tables below results/ into README.md, each between the marks that name it; `results/NAME/FILE.md` is a mark.

    python benchmarks/page.py

table.py, gate.py, demo_gap.py, demo_costs.py and demo_sweeps.py write these tables from their rows.
"""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
MARKED = re.compile(r"(?<=<!-- )(?P<file>results/\S+\.md) -->\n.*?(?=\n<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """Return a page with the tables that its marks name as they are on disk."""

    def put(found: re.Match[str]) -> str:
        return f"{found['file']} -->\n\n{(HERE / found['file']).read_text(encoding='utf-8')}"

    return MARKED.sub(put, text)


if __name__ == "__main__":
    page = HERE / "README.md"
    page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
