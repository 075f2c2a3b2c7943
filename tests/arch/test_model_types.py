"""The table of what every model type of transformers gets, and the command that shows it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_types
import transformers
import type_trials
from tiny_sizes import NOT_BUILT

from peft_lorasuite.arch import model_types, registry
from peft_lorasuite.cli.main import main

TABLE = model_types.measured()


def test_the_table_has_every_type_of_the_transformers_it_was_made_with() -> None:
    if transformers.__version__ != TABLE.transformers:
        pytest.skip(f"the table was made with transformers {TABLE.transformers}")
    assert set(TABLE.types) == set(tiny_types.TYPES)


def test_every_entry_is_a_method_or_a_reason() -> None:
    reasons = [entry for entry in TABLE.types.values() if entry not in model_types.METHODS]
    assert all(" " in reason for reason in reasons)
    assert {name: TABLE.types[name] for name in NOT_BUILT} == NOT_BUILT
    assert len(TABLE.types) - len(reasons) >= 165
    assert list(TABLE.types.values()).count("transplant") >= 105


@pytest.mark.parametrize("model_type", ["biogpt", "mamba"])
def test_a_type_gets_what_the_table_says(model_type: str, tmp_path: Path) -> None:
    """The table is measured again: `transplant` is served exactly where the table names it."""
    llama = type_trials.save_old("llama", tmp_path / "llama", seed=9)
    new = type_trials.save_new(model_type, tmp_path / "new")
    found = type_trials.trials(llama, new, tmp_path / "out", ["transplant"])[0]["outcome"]
    assert found == {"transplant": "learned", "distill": "refused"}[TABLE.types[model_type]]


def test_the_command_shows_every_type_within_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["families", "--all"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    shown = {line.split()[0]: line.split(maxsplit=1)[1] for line in text.splitlines() if line[:1].strip()}
    assert shown["llama"] == "all"
    assert shown["mamba"] == "distill"
    assert shown["musicgen"] == "none: predicts audio codes, not text"
    assert f"transformers {TABLE.transformers}" in text


def test_a_type_that_the_table_lacks_is_not_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.auto import modeling_auto

    names = {**modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "owl": "OwlForCausalLM"}
    monkeypatch.setattr(modeling_auto, "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", names)
    assert main(["families", "--all", "--json"]) == 0
    rows = {row.pop("model_type"): row for row in json.loads(capsys.readouterr().out)["model_types"]}
    assert rows["owl"]["methods"] == []
    assert rows["owl"]["why"].startswith("not measured")
    assert set(rows) >= set(registry.families())
    assert rows["biogpt"] == {"methods": ["distill", "transplant"], "why": ""}
