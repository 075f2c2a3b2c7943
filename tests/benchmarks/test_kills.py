"""benchmarks/kills.py with a handful of kills: what it counts, and that nothing is half-written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "kills.py"


def test_e_an_upgrade_killed_at_any_moment_leaves_the_old_output_or_the_new_one(tmp_path: Path) -> None:
    """Section E: `--overwrite` killed between its two renames; temporary folders of killed runs."""
    call = [sys.executable, str(PROGRAM), "--commands", "upgrade", "--kills", "4", "--seed", "1"]
    done = subprocess.run([*call, "--out", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "kills.json").read_text())["rows"]
    assert row["kills"] == row["second run ok"] == row["outputs"] == 4
    assert row["old in place"] + row["new in place"] == 4
    assert row["while writing"] >= 1
    assert "| `upgrade` | 4 |" in (tmp_path / "table.md").read_text()
