"""Mutated inputs of every kind end in a right result or in one error; `make fuzz` runs thousands of them."""

from __future__ import annotations

import random
from pathlib import Path

import fuzzer
import pytest
from huggingface_hub import constants
from kinds import KINDS
from world import World

CASES, SEED, CHUNK = 300, 0, 60

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The inputs before a mutation."""
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutated name must not be looked up on the Hub."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def keep(path: Path) -> None:
    """Mutate nothing."""


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "names"])
def test_the_inputs_are_accepted_as_they_are(kind: str, world: World, tmp_path: Path) -> None:
    """Otherwise every case would be refused for another reason than its mutation."""
    for number in range(8):
        place = tmp_path / str(number)
        (place / "out").mkdir(parents=True)
        outcome = fuzzer.run_kind(world, kind, number, random.Random(number), place, keep)
        assert outcome.verdict in ("same", "valid"), outcome


@pytest.mark.parametrize("first", range(0, CASES, CHUNK))
def test_mutated_inputs_are_refused_or_give_a_right_result(first: int, world: World, tmp_path: Path) -> None:
    outcomes = list(fuzzer.run_cases(world, range(first, first + CHUNK), SEED, tmp_path))
    assert fuzzer.faults(outcomes) == []
    counts = {verdict: sum(one.verdict == verdict for one in outcomes) for verdict in ("refused", "same")}
    assert min(counts.values()) > 0, counts
