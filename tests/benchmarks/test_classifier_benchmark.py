"""The benchmark of classifiers: its two tasks, and a run on pico backbones."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from benchmark_modules import benchmark_modules
from pico import pico_model, pico_tokenizer, save_backbone
from pico_classifiers import WORDS, rule


@pytest.fixture(scope="module")
def programs() -> Any:
    """The modules benchmarks/classifiers.py, benchmarks/intents.py and benchmarks/operations.py."""
    with benchmark_modules("classifiers", "intents", "operations") as found:
        yield found


def test_test_texts_have_phrasings_of_their_own(programs: Any) -> None:
    _, intents, _ = programs
    assert len(intents.INTENTS) == 20
    parts = [[text for intent in intents.INTENTS for text in intents.phrasings(intent, part)] for part in range(4)]
    assert not set(parts[0]) & set(parts[1])
    assert len(parts[0]) == len(set(parts[0]))  # no phrasing has two intents
    assert not set(parts[2]) & set(parts[3])
    assert sorted(parts[2] + parts[3]) == sorted(parts[0])
    assert len(parts[3]) == 40


def test_intents_are_balanced_different_and_the_same_for_a_seed(programs: Any) -> None:
    _, intents, _ = programs
    made = intents.make(400, 0, seed=3)
    assert made == intents.make(400, 0, seed=3) != intents.make(400, 0, seed=4)
    assert set(Counter(one["label"] for one in made).values()) == {20}
    assert len({one["text"] for one in made}) == 400


@pytest.mark.parametrize(
    ("solution", "wanted"),
    [
        ("He spent 93, so now he has 98 - 93 = 5 pennies.", "difference"),
        ("It cost $51 / 3 = $17.", "quotient"),
        ("30 + 4 = 34, then 34 + 2.5 = 36.5", "sum"),
        ("3 x 4 = 12", "product"),
        ("20% * 50 = 10", "product"),
        ("1 + 2 - 3 = 0", None),
        ("2 + 3 = 5. 5 * 2 = 10.", None),
        ("The answer is 7.", None),
    ],
)
def test_the_operation_is_the_only_one_of_the_solution(programs: Any, solution: str, wanted: str | None) -> None:
    assert programs[2].operation(solution) == wanted


def write_problems(folder: Path, count: int) -> None:
    """Write files of word problems; a rule of the last word decides the operation, and some have two."""
    source, made = random.Random(0), []
    for number in range(count):
        words = source.choices(WORDS, k=5)
        solution = f"8 {'+-*'[rule(words[-1])]} 4" if number % 9 else "8 + 4 = 12, 12 - 1 = 11"
        made.append({"instruction": f" {' '.join(words)} ", "output": solution})
    for number, name in enumerate(("math_data", "AddSub_test", "MultiArith_test", "SVAMP_test", "SingleEq_test")):
        (folder / f"{name}.json").write_text(json.dumps(made[number::5]))


def test_word_problems_are_split_into_different_texts(programs: Any, tmp_path: Path) -> None:
    write_problems(tmp_path, 700)
    counts = {"train": 200, "unlabeled": 250, "test": 100}
    train, unlabeled, test = programs[2].make(tmp_path, **counts, dev=False)
    assert (len(train), len(unlabeled), len(test)) == (200, 250, 100)
    assert len({*(one["text"] for one in (*train, *test)), *unlabeled}) == 550
    assert {one["label"] for one in train} == {"sum", "difference", "product"}
    other_train, other_unlabeled, dev = programs[2].make(tmp_path, **counts, dev=True)
    learned = {*(one["text"] for one in other_train), *other_unlabeled}
    assert not learned & {one["text"] for one in (*dev, *test)}
    assert not {one["text"] for one in dev} & {one["text"] for one in test}


def test_the_shares_are_those_of_the_gain_of_full_retraining(programs: Any, tmp_path: Path, capsys: Any) -> None:
    tokenizer = pico_tokenizer(WORDS)
    old = save_backbone(tmp_path / "old", pico_model("llama", seed=1, num_hidden_layers=2), tokenizer)
    new = save_backbone(tmp_path / "new", pico_model("qwen2", seed=2, num_hidden_layers=2), tokenizer)
    write_problems(tmp_path, 1100)
    arguments = [
        "--task", "operations", "--data", str(tmp_path), "--items", "100",
        "--old", str(old), "--new", str(new), "--out", str(tmp_path / "out"), "--seeds", "0", "--texts", "300",
        "--labels", "500", "--rank", "4", "--epochs", "3", "--old-rate", "1e-2", "--one-process",
        "--rows", "old-adapted,probe,full-0.01,full-0.0001,transplant,lorasuite",
    ]  # fmt: skip
    programs[0].main(arguments)
    found = json.loads((tmp_path / "out" / "summary.json").read_text())
    rows = found["rows"]
    assert rows["old-adapted"]["accuracy"] > 0.9
    assert rows["full-0.01"]["accuracy"] > 0.9
    assert rows["full-0.01"]["share"] == pytest.approx(1)
    assert rows["full-0.0001"]["share"] < 1  # the best rate counts
    gain = rows["full-0.01"]["accuracy"] - found["majority"]
    assert rows["probe"]["share"] == pytest.approx((rows["probe"]["accuracy"] - found["majority"]) / gain)
    assert rows["transplant"]["share"] > max(0.35, rows["lorasuite"]["share"] + 0.2)
    table = (tmp_path / "out" / "table.md").read_text()
    assert table in capsys.readouterr().out
    before = (tmp_path / "out" / "seed0" / "full-0.01.json").stat().st_mtime_ns
    programs[0].main(arguments)  # every stage is read, none is measured again
    assert (tmp_path / "out" / "seed0" / "full-0.01.json").stat().st_mtime_ns == before
