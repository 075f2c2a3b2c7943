"""Planted upgrades: the new backbone computes the same function, so the transferred adapter has the same effect."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pico import EXPERTS, PICO
from planted import ADMITS, EVERY
from planted_run import Case, error

from peft_lorasuite.upgrading.map_cache import cache_folder

TOLERANCE = 1e-4
"""Of the adapter's own effect on the logits."""
pytestmark = pytest.mark.filterwarnings("ignore:Adapter 'default'. [0-9]+ LoRA tensor:UserWarning")
"""PEFT 0.21 takes every bias of a LoRA B for a shard."""


SINGLE = [Case(name, (change,)) for change, names in ADMITS.items() for name in names]


@pytest.mark.parametrize("case", SINGLE, ids=[f"{case.name}-{case.changes[0]}" for case in SINGLE])
def test_each_change_alone_is_exact(case: Case, tmp_path: Path) -> None:
    assert error(case, tmp_path) < TOLERANCE


LORA = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True, "r": 4},
    "patterns": {"rank_pattern": {r".*\.0\..*": 2}, "alpha_pattern": {r".*\.1\..*": 9}},
    "one rank": {"r": 1, "lora_alpha": 4},
}
BIASED = ("bloom", "falcon", "gpt2", "gpt_neox", "phi", "granite", "llama")
"""Types that can have a bias in every linear module, as PEFT wants it for ``lora_bias``."""
WITH_BIAS = {name: {"attention_bias": True, "mlp_bias": True} for name in ("granite", "llama")}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Some changes that a type admits, in any order, with any of the adapters."""
    name = draw(st.sampled_from(EVERY))
    admitted = [change for change, names in ADMITS.items() if name in names]
    changes = draw(st.lists(st.sampled_from(admitted), min_size=2, unique=True))
    lora, values = dict(LORA[draw(st.sampled_from(sorted(LORA)))]), {}
    if name in BIASED and draw(st.booleans()):
        lora, values = lora | {"lora_bias": True}, WITH_BIAS.get(name, {})
    return Case(name, tuple(changes), draw(st.integers(0, 99)), values, lora)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_changes_in_any_order_are_exact(case: Case, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert error(case, tmp_path_factory.mktemp("case")) < TOLERANCE


@pytest.mark.parametrize("name", EVERY)
def test_all_changes_at_once_are_exact(name: str, tmp_path: Path) -> None:
    changes = tuple(change for change, names in ADMITS.items() if name in names)
    assert error(Case(name, changes, seed=1), tmp_path) < TOLERANCE


@pytest.mark.parametrize("lora", LORA)
@pytest.mark.parametrize("name", ["llama", "phi3", "gpt_neox"])
def test_every_kind_of_scaling_is_exact(name: str, lora: str, tmp_path: Path) -> None:
    assert error(Case(name, ("permuted hidden", "permuted heads"), 2, {}, LORA[lora]), tmp_path) < TOLERANCE


@pytest.mark.parametrize("name", BIASED)
def test_biases_of_the_adapter_are_carried(name: str, tmp_path: Path) -> None:
    changes = ("widened hidden", "turned heads", "units" if name != "bloom" else "permuted units")
    case = Case(name, changes, 3, WITH_BIAS.get(name, {}), {"lora_bias": True})
    assert error(case, tmp_path) < TOLERANCE


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_the_map_that_is_built_when_none_is_given_is_exact_and_kept(name: str, tmp_path: Path) -> None:
    changes = tuple(change for change, names in ADMITS.items() if name in names and change != "vocabulary")
    assert error(Case(name, changes, seed=4), tmp_path, built_in=True) < TOLERANCE
    assert len(list(cache_folder().iterdir())) == 1


def test_every_type_that_has_a_converter_is_planted() -> None:
    assert set(EVERY) == set(PICO | EXPERTS) - {"gemma3"}
