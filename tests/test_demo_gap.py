"""Gap recovered on the demo pair, as benchmarks/demo_gap.py measures it: a few rows again, against those committed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
RESULTS = BENCHMARKS / "results" / "demo_gap"
TUNED = {"learning_rate": 3e-3, "warmup": 0.1}
"""What the development items chose for both."""


@pytest.fixture(scope="module")
def programs() -> Any:
    """The modules of the benchmark."""
    pytest.importorskip("matplotlib", reason="the benchmarks draw")
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import demo_gap
        import demo_pair

        yield demo_gap, demo_pair
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def pair(programs: Any) -> Any:
    """The demo pair with its map."""
    return programs[1].DemoPair()


@pytest.fixture(scope="module")
def committed(programs: Any) -> dict[str, dict[str, Any]]:
    """The rows of the last full run."""
    return programs[0].load(RESULTS)


@pytest.fixture(scope="module")
def recovered(programs: Any, pair: Any, committed: dict[str, dict[str, Any]]) -> Any:
    """A function from what was made to the share of the gap that it recovers."""

    def share(made: Any) -> float:
        found = pair.score(made.model)
        return programs[0].gap(found, committed["base"], committed["full"])

    return share


def test_the_base_is_the_committed_one(pair: Any, committed: dict[str, dict[str, Any]]) -> None:
    assert pair.score(pair.new.load(dtype="float32"))["nll"] == pytest.approx(committed["base"]["nll"], abs=0.01)


@pytest.mark.parametrize("row", ["copy", "lorasuite", "lorasuite-reference", "cross-lora", "transport-ridge"])
def test_a_method_of_weights_gives_what_it_gave(
    row: str, pair: Any, recovered: Any, committed: dict[str, dict[str, Any]], programs: Any
) -> None:
    before = programs[0].gap(committed[row], committed["base"], committed["full"])
    assert recovered(pair.upgraded(row)) == pytest.approx(before, abs=0.05)


def test_behaviour_without_labels_and_with_a_hundred_recovers_no_less(pair: Any, recovered: Any) -> None:
    carried = pair.kept("transplant")
    alone, tuned = recovered(carried(False)), recovered(pair.tuned(carried(True), **TUNED))
    vanilla = recovered(pair.vanilla(**TUNED))
    assert alone > 0.6
    assert tuned > 0.88
    assert 0.05 < vanilla < 0.4  # more, and the demo would tell nothing; less, and training would be broken
    assert tuned > vanilla + 0.4


def test_the_committed_table_is_made_of_the_committed_rows(committed: dict[str, dict[str, Any]], programs: Any) -> None:
    assert set(committed) == set(programs[0].ROWS)
    assert (RESULTS / "table.md").read_text() == programs[0].table(committed) + "\n"
    assert sum(row["seconds"] for row in committed.values()) < 300
