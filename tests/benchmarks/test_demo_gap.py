"""Gap recovered on the demo pair, as benchmarks/gap.py measures it: a few rows again, against those committed."""

from __future__ import annotations

from typing import Any

import pytest
from benchmark_modules import BENCHMARKS, benchmark_modules

RESULTS = BENCHMARKS / "results" / "demo_gap"
TUNED = {"learning_rate": 3e-3, "warmup": 0.1}
"""What was best for both on development items."""


@pytest.fixture(scope="module")
def programs() -> Any:
    """Modules of the benchmark."""
    with benchmark_modules("tables", "demo_pair", "gap_demo") as found:
        yield found


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
    """Return a function from a row's model to the gap that it recovers."""

    def share(made: Any) -> float:
        found = pair.score(made.model)
        return programs[0].gap(found, committed["base"], committed["full"])

    return share


def test_the_base_is_the_committed_one(pair: Any, committed: dict[str, dict[str, Any]]) -> None:
    assert pair.score(pair.new.load(dtype="float32"))["nll"] == pytest.approx(committed["base"]["nll"], abs=0.01)


@pytest.mark.parametrize("row", ["copy", "lorasuite", "lorasuite-reference", "cross-lora"])
def test_a_weight_method_recovers_what_the_committed_row_says(
    row: str, pair: Any, recovered: Any, committed: dict[str, dict[str, Any]], programs: Any
) -> None:
    before = programs[0].gap(committed[row], committed["base"], committed["full"])
    assert recovered(pair.upgraded(row)) == pytest.approx(before, abs=0.05)


def test_transplant_recovers_most_without_labels_and_with_a_hundred(pair: Any, recovered: Any) -> None:
    attach = pair.upgrade_once("transplant")
    alone, tuned = recovered(attach(False)), recovered(pair.tuned(attach(True), **TUNED))
    vanilla = recovered(pair.vanilla(**TUNED))
    assert alone > 0.6
    assert tuned > 0.88
    assert 0.05 < vanilla < 0.4  # more, and the demo would tell nothing; less, and training would be broken
    assert tuned > vanilla + 0.4


def test_the_committed_rows_are_those_that_the_program_makes(
    committed: dict[str, dict[str, Any]], programs: Any
) -> None:
    assert set(committed) == set(programs[2].ROWS)
    assert sum(row["seconds"] for row in committed.values()) < 300
