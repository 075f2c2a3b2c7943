"""benchmarks/reproduce.py on a pico pair: every stage of the paper's experiment, cached."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from command_fixtures import Pair, pair

pytest.importorskip("lm_eval")

home = pair
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ROWS = ["old", "old-lora", "new", "upgraded", "vanilla", "upgraded-lft", "retrained"]
ITEM = "Please answer the following question with true or false, question: is the {} red?\n\nAnswer format: true/false"
WORDS = ["cat", "dog", "bird", "sun", "moon"]


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The program, imported as it is when it runs: with its siblings on the path."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("reproduce")


@pytest.fixture
def call(home: Pair, tmp_path: Path) -> list[str]:
    """A whole experiment that takes seconds: the first of the paper's pairs with pico backbones in its place."""
    items = [{"instruction": ITEM.format(word), "input": "", "answer": "true"} for word in WORDS]
    (tmp_path / "boolq_test.json").write_text(json.dumps(items))
    train = [{**item, "output": "the correct answer is true"} for item in items]
    (tmp_path / "train.json").write_text(json.dumps(train * 4))
    return [
        "minicpm", "--old", str(home.old), "--new", str(home.new), "--suite", "boolq", "--data", str(tmp_path),
        "--train", str(tmp_path / "train.json"), "--train-samples", "20", "--samples", "4", "--rank", "4",
        "--epochs", "1", "--limit", "3", "--max-new-tokens", "4", "--out", str(tmp_path / "out"),
    ]  # fmt: skip


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_the_whole_experiment_is_run_once_and_laid_out_as_the_paper_does(
    program: ModuleType, call: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.main(call) == 0
    out = tmp_path / "out"
    result = read(out / "result.json")
    assert list(result["rows"]) == ROWS
    assert result["whole"] is False
    assert {len(row["evaluation"]["tasks"][0]["outcomes"]) for row in result["rows"].values()} == {3}
    made = [f"made-{name}" for name in ("adapter", "map", "retrained", "upgraded", "upgraded-lft", "vanilla")]
    assert list(result["stages"]) == made
    used = {
        name: read(out / "work" / name / "lorasuite_finetune.json")["used"]
        for name in ("adapter", "vanilla", "upgraded-lft", "retrained")
    }
    assert used == {"adapter": 20, "vanilla": 4, "upgraded-lft": 4, "retrained": 20}
    assert read(out / "work" / "upgraded" / "lorasuite_report.json")["method"]["name"] == "lorasuite"
    lines = (out / "table.md").read_text().splitlines()
    labels = [line.split("|")[1].strip() for line in lines if line.startswith("| MiniCPM")]
    assert labels[:7] == [
        "MiniCPM-S-1B, no adapter", "MiniCPM-S-1B, LoRA (20)", "MiniCPM-2B, no adapter",
        "MiniCPM-2B, LoRASuite w/o LFT", "MiniCPM-2B, LoRA (4)", "MiniCPM-2B, LoRASuite w LFT (4)",
        "MiniCPM-2B, LoRA (20)",
    ]  # fmt: skip
    assert len(labels) == 14
    assert all(label.endswith("*(published)*") for label in labels[7:])
    assert "| BoolQ |" in lines[0]
    assert str(tmp_path) not in (out / "result.json").read_text()

    before = {path: path.stat().st_mtime_ns for path in [*out.glob("made-*.json"), *(out / f"{r}.json" for r in ROWS)]}
    assert program.main(call) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    capsys.readouterr()
    assert program.main([*call, "--seed", "1"]) == 1
    assert "holds stages of other settings" in capsys.readouterr().out


def test_a_given_adapter_and_map_are_taken_and_a_lost_folder_is_made_again(
    program: ModuleType, call: list[str], home: Pair, tmp_path: Path
) -> None:
    call = [*call, "--adapter", str(home.adapter), "--map", str(home.map), "--rows", "old-lora,upgraded"]
    assert program.main(call) == 0
    out = tmp_path / "out"
    assert [path.stem for path in out.glob("made-*")] == ["made-upgraded"]
    weights = out / "work" / "upgraded" / "adapter_model.safetensors"
    first = weights.read_bytes()
    for file in weights.parent.iterdir():
        file.unlink()
    weights.parent.rmdir()
    (out / "upgraded.json").unlink()
    assert program.main(call) == 0
    assert weights.read_bytes() == first
    assert "LoRA (given)" in (out / "table.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["minicpm", "--suite", "math,boolq"], "one suite at a time"),
        (["minicpm", "--rows", "best"], "unknown rows best; known: old, old-lora"),
        (["tiny"], "invalid choice: 'tiny'"),
    ],
)
def test_a_wrong_call_says_why(
    program: ModuleType, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        program.main(words)
    assert message in capsys.readouterr().err


def test_pairs_of_the_first_paper_have_their_published_rows(program: ModuleType) -> None:
    titles = [pair.title for pair in program.PAIRS.values()]
    assert set(program.published_pairs()) <= set(titles)
    for name in ("pythia", "bloom"):
        rows = program.published_rows(program.PAIRS[name].title, "math")
        assert any("LFT (1k)" in row for row in rows)
        assert dict(program.PAIRS[name].samples) == {"math": 1000}
