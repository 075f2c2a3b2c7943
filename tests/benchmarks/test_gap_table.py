"""The table of a gap benchmark: shares of the gain, means over seeds, and what it does not claim."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmark_modules import BENCHMARKS, benchmark_modules


@pytest.fixture(scope="module")
def program() -> Any:
    """Return the module benchmarks/tables.py."""
    with benchmark_modules("tables") as found:
        yield found[0]


def put(folder: Path, name: str, nll: float, right: str, **more: Any) -> None:
    """Write the JSON of a row, as gap.py does."""
    row = {
        "row": name, "nll": nll, "accuracy": right.count("1") / len(right), "interval": [0.0, 1.0], "exact": 0.0,
        "items": len(right), "right": right, "seconds": 10.0,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(row | more), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Rows of a pair: a base, a row with two seeds, and the ceiling of the gain."""
    folder = tmp_path / "pair"
    put(folder, "base", 3.0, "0000")
    put(folder, "full", 1.0, "1111")
    put(folder, "some", 2.0, "0011")
    put(folder / "seed1", "some", 1.6, "0001")
    return folder


def page(program: Any, folder: Path, which: str = "table.md") -> str:
    """Return one of the tables that the program writes."""
    return program.tables(folder, program.load(folder), "full")[folder / which]


def cells(text: str, row: str) -> list[str]:
    """Return the cells of the first line of a row."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {row} |"))
    return [cell.strip() for cell in line.split("|")]


def test_a_row_is_the_mean_over_its_seeds_and_says_how_many(program: Any, folder: Path) -> None:
    text = page(program, folder)
    assert cells(text, "some")[2:4] == ["1.800 ± 0.283 (2)", "60%"]
    assert cells(text, "some")[4].startswith("0.375 ")
    assert cells(text, "some")[5].startswith("+0.375 ")
    assert cells(text, "base")[3] == "0%"
    assert cells(text, "full")[3] == "100%"


def test_what_only_one_seed_was_asked_for_is_the_mean_over_that_one(program: Any, folder: Path) -> None:
    wrote = {"generated_interval": [0.0, 1.0], "generated_ended": 1.0}
    put(folder, "base", 3.0, "0000", generated_right="0000", **wrote)
    put(folder, "some", 2.0, "0011", generated_right="0111", **wrote)  # seed 1 wrote nothing out
    found = cells(page(program, folder), "some")
    assert found[2] == "1.800 ± 0.283 (2)"
    assert found[4].startswith("0.750 (")
    assert found[5].startswith("+0.750 (")


def test_a_gain_of_less_than_a_tenth_of_a_nat_has_no_shares(program: Any, folder: Path) -> None:
    put(folder, "full", 2.95, "1111")
    assert cells(page(program, folder), "some")[3] == "undefined"


def test_a_share_that_rounds_to_nothing_has_no_sign(program: Any) -> None:
    assert [program.percent(share) for share in (-0.001, -0.1, 0.004, 1.0)] == ["0%", "-10%", "0%", "100%"]


def test_archived_rows_have_a_table_of_their_own(program: Any, folder: Path) -> None:
    archive = folder.parent / "archive" / folder.name
    put(archive, "once", 2.5, "0001")
    assert "| once |" not in page(program, folder)
    before = program.tables(folder, program.load(folder), "full")[archive / "table.md"]
    assert cells(before, "once")[3] == "25%"
    assert "| some |" not in before


def test_the_old_backbone_has_no_share_of_the_new_ones_gain(program: Any, folder: Path) -> None:
    put(folder, "old-adapted", 0.5, "1111")
    assert cells(page(program, folder), "old-adapted")[3] == "-"


def test_accuracy_on_facts_is_split_by_what_the_prompts_asked_for(program: Any, folder: Path) -> None:
    put(folder, "other", 1.2, "1100", seen_accuracy=1.0, unseen_accuracy=0.25)
    text = page(program, folder)
    assert cells(text, "row")[5:7] == ["on prompted facts", "on facts that no given prompt asks for"]
    assert cells(text, "other")[5:7] == ["1.000", "0.250"]
    assert cells(text, "some")[5:7] == ["-", "-"]


def test_generated_answers_replace_the_likeliest_option(program: Any, folder: Path) -> None:
    wrote = {"generated_interval": [0.0, 1.0], "generated_ended": 0.5}
    put(folder, "base", 3.0, "0000", generated_right="00", **wrote)
    put(folder, "full", 1.0, "1111", generated_right="10", **wrote)
    found = cells(page(program, folder), "full")
    assert found[4].startswith("0.500 (")
    assert found[5].startswith("+0.500 (")
    assert found[6] == "50%"


def test_without_a_base_or_a_ceiling_it_says_what_to_measure(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, "full", 1.0, "1")
    monkeypatch.setattr(sys, "argv", ["tables.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="'base' and 'full'"):
        program.main()
    assert not (tmp_path / "table.md").exists()


def test_table_and_chart_are_written_beside_the_rows(
    program: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="the benchmarks draw")
    monkeypatch.setattr(sys, "argv", ["tables.py", str(folder)])
    program.main()
    assert "The gap is that of the row 'full'." in (folder / "table.md").read_text(encoding="utf-8")
    assert (folder / "gap.png").read_bytes().startswith(b"\x89PNG")


def test_a_row_of_the_demo_pair_shows_what_it_took(program: Any, folder: Path) -> None:
    put(folder, "some", 2.0, "0011", made_seconds=1.25, peak_mb=512, seeds=[{"nll": 1.9}, {"nll": 2.1}])
    (folder / "seed1" / "some.json").unlink()
    found = cells(page(program, folder), "some")
    assert found[2:4] == ["2.000 ± 0.141 (2)", "50%"]
    assert found[5:7] == ["1.2 s", "512 MB"]


def test_the_pages_have_the_tables_that_the_committed_rows_make(program: Any) -> None:
    """No figure of these tables is typed by hand."""
    results = program.RESULTS
    marked = []
    for page in (BENCHMARKS / "README.md", BENCHMARKS / "HISTORY.md"):
        text = page.read_text(encoding="utf-8")
        assert program.filled(text) == text, "run python benchmarks/tables.py"
        marked += program.MARKED.findall(text)
    assert {"results/summary.md", *(f"results/archive/{name}/table.md" for name in program.COMMITTED)} <= set(marked)
    assert (results / "summary.md").read_text(encoding="utf-8") == program.summary(results)
    for name in program.COMMITTED:
        for path, table in program.tables(results / name, program.load(results / name), "full").items():
            assert path.read_text(encoding="utf-8") == table, f"run python benchmarks/tables.py {path.parent}"


def test_every_command_of_the_pages_exists() -> None:
    text = "".join((BENCHMARKS / name).read_text(encoding="utf-8") for name in ("README.md", "HISTORY.md"))
    text = text.replace("\\\n", " ")
    commands = re.findall(r"^python benchmarks/(\w+)\.py(.*)$", text, re.MULTILINE)
    assert {name for name, _ in commands} >= {
        "gap",
        "sweeps",
        "gate",
        "study",
        "speed",
        "memory",
        "reproduce",
        "tables",
    }
    for name, arguments in commands:
        source = "".join(path.read_text(encoding="utf-8") for path in sorted(BENCHMARKS.glob(f"{name}*.py")))
        assert source, name
        shared = set(re.findall(r"^from (\w+) import", source, re.MULTILINE))
        source += "".join(path.read_text(encoding="utf-8") for path in BENCHMARKS.glob("*.py") if path.stem in shared)
        assert [flag for flag in re.findall(r"--[\w-]+", arguments) if f'"{flag}"' not in source] == [], name
