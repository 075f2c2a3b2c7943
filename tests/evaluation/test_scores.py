"""Intervals against simulation and known values, paired comparison, JSON, the papers' table and their own rows."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest

from peft_lorasuite.errors import LoraSuiteError
from peft_lorasuite.evaluation.published import published, published_pairs, published_rows
from peft_lorasuite.evaluation.scores import Evaluation, TaskScore, compare
from peft_lorasuite.evaluation.tables import comparison_table, markdown_table
from peft_lorasuite.evaluation.tasks import SUITES, select


def score(outcomes: str, task: str = "boolq", prefix: str = "i") -> TaskScore:
    items = tuple(f"{prefix}{place}" for place in range(len(outcomes)))
    return TaskScore(task, items, tuple(float(o) for o in outcomes), 1.0)


def evaluation(*scores: TaskScore, scoring: str = "generate") -> Evaluation:
    return Evaluation(scores, "model", scoring)


@pytest.mark.parametrize(
    "data", [b"\xff\xfe\x00", b"[1]", b"{", b'{"tasks": ' + b"[" * 10**5, b'{"version": 1, "tasks": [5]}']
)
def test_a_file_that_is_no_evaluation_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "scores.json").write_bytes(data)
    with pytest.raises(LoraSuiteError, match=r"scores\.json(: the file |, model: missing value)"):
        Evaluation.load(tmp_path / "scores.json")


def test_a_score_is_the_mean_with_wilsons_interval() -> None:
    one = score("1" * 8 + "0" * 2)
    assert (one.value, one.n) == (0.8, 10)
    assert one.stderr == pytest.approx(0.4 / 3)  # standard deviation of the sample over root n
    assert one.interval == pytest.approx((0.4901625, 0.9433178), abs=1e-6)  # Wilson's for 8 of 10
    assert score("0000").interval == pytest.approx((0.0, 0.4898908), abs=1e-6)
    assert score("1111").interval == pytest.approx((0.5101092, 1.0), abs=1e-6)


def test_the_average_counts_every_benchmark_once() -> None:
    whole = evaluation(score("1100"), score("1" * 90 + "0" * 10, "ARC-Easy"))
    assert whole.average == pytest.approx(0.7)
    low, high = whole.interval
    assert low < 0.7 < high
    assert high - low < (score("1100").interval[1] - score("1100").interval[0])


def test_the_intervals_hold_the_truth_nineteen_times_in_twenty() -> None:
    rng, hits, trials = random.Random(0), [0, 0, 0], 400
    for _ in range(trials):
        draw = [[float(rng.random() < p) for _ in range(60)] for p in (0.7, 0.5)]
        names = tuple(map(str, range(60)))
        a = evaluation(TaskScore("boolq", names, tuple(draw[0])), TaskScore("piqa", names, tuple(draw[1])))
        b = evaluation(TaskScore("boolq", names, tuple(draw[1])), TaskScore("piqa", names, tuple(draw[0])))
        truths = (0.7, 0.6, 0.2)
        intervals = (a.tasks[0].interval, a.interval, compare(a, b).tasks[0].interval)
        for place, (truth, (low, high)) in enumerate(zip(truths, intervals, strict=True)):
            hits[place] += low <= truth <= high
    assert all(0.92 <= hit / trials <= 0.985 for hit in hits), hits


def test_two_models_are_compared_item_by_item() -> None:
    base, new = (
        evaluation(score("11000000"), score("0" * 8, "piqa")),
        evaluation(score("10111000"), score("1" * 8, "piqa")),
    )
    found = compare(new, base)
    boolq, piqa = found.tasks
    assert (boolq.value, boolq.wins, boolq.losses, boolq.n) == (0.25, 3, 1, 8)
    assert boolq.relative == pytest.approx(1.0)  # twice as good as the base
    differences = [0, -1, 1, 1, 1, 0, 0, 0]
    spread = math.sqrt(sum((d - 0.25) ** 2 for d in differences) / 7)
    assert boolq.stderr == pytest.approx(spread / math.sqrt(8))
    half = 1.959964 * math.sqrt(5 / 10 - 0.04) / math.sqrt(10)
    assert boolq.interval == pytest.approx((0.2 - half, 0.2 + half), abs=1e-6)
    assert (piqa.value, piqa.stderr, piqa.relative) == (1.0, 0.0, None)
    assert 0.4 < piqa.interval[0] < 1.0 == piqa.interval[1]
    assert found.average.value == pytest.approx(0.625)
    assert (found.average.wins, found.average.losses, found.average.n) == (11, 1, 16)


def test_a_model_does_not_differ_from_itself_but_the_interval_stays_open() -> None:
    same = compare(evaluation(score("1100")), evaluation(score("1100")))
    assert same.average.value == 0.0
    assert same.average.interval[0] < 0 < same.average.interval[1]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (evaluation(score("11", "piqa")), "same benchmarks"),
        (evaluation(score("11"), scoring="likelihood"), "same way"),
        (evaluation(score("11", prefix="j")), "boolq: .*same items.*same data, limit and seed"),
        (evaluation(score("111")), "same items"),
    ],
)
def test_only_like_is_compared_with_like(other: Evaluation, message: str) -> None:
    with pytest.raises(LoraSuiteError, match=message):
        compare(evaluation(score("10")), other)
    with pytest.raises(LoraSuiteError):
        markdown_table({"a": evaluation(score("10")), "b": other})


def test_an_evaluation_survives_json(tmp_path: Path) -> None:
    before = Evaluation((score("10"), score("11", "piqa")), "m", "generate", "a", {"limit": 2, "seed": 0})
    before.save(tmp_path / "e.json")
    assert Evaluation.load(tmp_path / "e.json") == before
    record = before.to_dict()
    assert (record["average"], record["tasks"][0]["n"], record["tasks"][0]["value"]) == (0.75, 2, 0.5)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"version": 2}', '{"version": 1, "tasks": []}'])
def test_another_file_is_not_an_evaluation(tmp_path: Path, content: str) -> None:
    (tmp_path / "e.json").write_text(content)
    with pytest.raises(LoraSuiteError):
        Evaluation.load(tmp_path / "e.json")


def test_scores_without_items_are_refused() -> None:
    with pytest.raises(LoraSuiteError, match="one outcome"):
        TaskScore("boolq", ("a",), ())
    with pytest.raises(LoraSuiteError, match="at least one task"):
        evaluation()
    with pytest.raises(LoraSuiteError, match="unknown benchmark 'piqa'"):
        evaluation(score("1"))["piqa"]
    with pytest.raises(LoraSuiteError, match="at least one"):
        markdown_table({})


def test_the_table_has_the_papers_shape() -> None:
    base = evaluation(score("1000"), score("1100", "ARC-Easy"))
    upgraded = evaluation(score("1110"), score("1111", "ARC-Easy"))
    rows = published_rows("MiniCPM-S-1B -> MiniCPM-2B", "commonsense")
    lines = markdown_table({"base": base, "upgraded": upgraded}, published=rows).splitlines()
    assert lines[0] == "|  | BoolQ | ARC-e | Avg. |"
    assert lines[1] == "| --- | ---: | ---: | ---: |"
    assert lines[2].startswith("| base | 25.0 [4.6, 69.9] | 50.0 [15.0, 85.0] | 37.5 [")
    assert lines[3].startswith("| upgraded | 75.0 [30.1, 95.4] | 100.0 [51.0, 100.0] | 87.5 [")
    assert "| MiniCPM-2B, LoRASuite w LFT (100) *(published)* | 61.28 | 39.02 | 50.15 |" in lines
    assert lines[-1].endswith("(generated answers), 95 % intervals in brackets. Items: BoolQ 4, ARC-e 4.")
    assert "| - | - | - |" in markdown_table({"base": base}, published={"x": {"OBQA": 1.0}})


def test_the_comparison_table_has_the_gain_and_the_counts() -> None:
    base = evaluation(score("1000"), score("0000", "ARC-Easy"))
    upgraded = evaluation(score("0110"), score("1111", "ARC-Easy"))
    lines = comparison_table(compare(upgraded, base)).splitlines()
    assert lines[2].startswith("| BoolQ | +25.0 [")
    assert lines[2].endswith("] | +100.0 % | 2 | 1 | 4 |")
    assert lines[3].endswith("] | - | 4 | 0 | 4 |")
    assert lines[4].startswith("| Avg. | +62.5 [")
    with pytest.raises(LoraSuiteError, match="unknown benchmark 'mmlu'"):
        markdown_table({"a": evaluation(score("1", "mmlu"))})


def test_the_published_averages_of_the_first_pair_are_those_of_the_paper() -> None:
    averages = {}
    for suite in SUITES:
        rows = published_rows("minicpm-s-1b->minicpm-2b", suite)
        assert len(rows) == 7
        averages[suite] = [round(sum(row.values()) / len(row), 2) for row in rows.values()]
    assert averages["math"] == pytest.approx([16.27, 26.62, 23.85, 23.96, 22.82, 43.8, 42.39], abs=0.011)
    assert averages["commonsense"] == pytest.approx([22.68, 40.36, 32.72, 32.69, 38.6, 42.34, 40.85], abs=0.011)


def test_published_scores_are_whole_numbers_of_items() -> None:
    """A slip in copying would show: 784 scores, of which the paper itself prints three that no count gives."""
    record, odd, off = published(), [], []
    for table in record["tables"]:
        benchmarks = select(table["suite"])
        assert record["columns"][table["suite"]] == [b.column for b in benchmarks]
        for row in table["rows"]:
            where = (table["table"], row["model"], row["adapter"])
            if abs(sum(row["scores"]) / len(benchmarks) - row["average"]) > 0.0101:
                off.append(where)
            for value, b in zip(row["scores"], benchmarks, strict=True):
                count = value * b.size / 100
                if abs(count - round(count)) > 0.005 * b.size / 100 + 1e-6:
                    odd.append((*where, b.column))
    assert odd == [
        (6, "MiniCPM-2B", "AdaLoRA (1k)", "SingleEq"),
        (15, "Bloomz-1B1", "LoRA (10k)", "PIQA"),
        (19, "Qwen-2.5-3B", "LoRA (100)", "ARC-c"),
    ]
    assert off == [(19, "Qwen-1.5-1.8B", "LoRA (10k)")]


def test_tables_that_the_paper_does_not_have_are_refused() -> None:
    assert len(published_pairs()) == 6
    assert "MiniCPM-2B, DoRA (10k)" in published_rows(published_pairs()[0], "math", "dora")
    with pytest.raises(LoraSuiteError, match="unknown published pair"):
        published_rows("Phi-1.5 -> Phi-2", "math")
    with pytest.raises(LoraSuiteError, match=r"no such table \(got commonsense with DoRA"):
        published_rows("MiniCPM-S-1B -> MiniCPM-2B", "commonsense", "DoRA")
