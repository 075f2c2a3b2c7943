"""The benchmark of classifiers: its intent task, and a run on pico backbones."""

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
    """The modules benchmarks/classifiers.py and benchmarks/intents.py."""
    with benchmark_modules("classifiers", "intents") as found:
        yield found


def test_test_texts_have_phrasings_of_their_own(programs: Any) -> None:
    _, intents = programs
    assert len(intents.INTENTS) == 20
    parts = [[text for intent in intents.INTENTS for text in intents.phrasings(intent, part)] for part in range(4)]
    assert not set(parts[0]) & set(parts[1])
    assert len(parts[0]) == len(set(parts[0]))  # no phrasing has two intents
    assert not set(parts[2]) & set(parts[3])
    assert sorted(parts[2] + parts[3]) == sorted(parts[0])
    assert len(parts[3]) == 40


def test_intents_are_balanced_different_and_the_same_for_a_seed(programs: Any) -> None:
    _, intents = programs
    made = intents.make(400, 0, seed=3)
    assert made == intents.make(400, 0, seed=3) != intents.make(400, 0, seed=4)
    assert set(Counter(one["label"] for one in made).values()) == {20}
    assert len({one["text"] for one in made}) == 400


def records(count: int, seed: int) -> list[dict[str, str]]:
    """Return examples of a rule in the format of the LLM-Adapters collection."""
    source, made = random.Random(seed), []
    for _ in range(count):
        words = source.choices(WORDS, k=4)
        made.append({"instruction": f" {' '.join(words)}\n\nAnswer format: 0/1/2", "answer": str(rule(words[-1]))})
    return made


def test_the_shares_are_those_of_the_gain_of_full_retraining(programs: Any, tmp_path: Path, capsys: Any) -> None:
    tokenizer = pico_tokenizer(WORDS)
    old = save_backbone(tmp_path / "old", pico_model("llama", seed=1, num_hidden_layers=2), tokenizer)
    new = save_backbone(tmp_path / "new", pico_model("qwen2", seed=2, num_hidden_layers=2), tokenizer)
    for name, count, seed in (("train", 800, 0), ("test", 100, 1)):
        (tmp_path / f"{name}.json").write_text(json.dumps(records(count, seed)))
    arguments = [
        "--task", "rule", "--train", str(tmp_path / "train.json"), "--test", str(tmp_path / "test.json"),
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
