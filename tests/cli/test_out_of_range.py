"""Numbers that are too large for what is done with them: one sentence, and nothing is written."""

from __future__ import annotations

import shutil
from pathlib import Path

import command_fixtures
import pytest
from command_fixtures import Pair, refused
from safetensors.torch import load_file, save_file

from peft_lorasuite import LoraSuiteError
from peft_lorasuite.adapters.peft_format import WEIGHTS
from peft_lorasuite.methods.options import make_options
from peft_lorasuite.methods.registry import find

pair = command_fixtures.pair


@pytest.mark.parametrize(
    ("method", "name", "value"),
    [
        ("lorasuite", "gain", "1e308"), ("lorasuite", "gain", -1e38), ("transplant", "weight", 1e308),
        ("transplant", "shift_ridge", "1e308"), ("distill", "learning_rate", "1e40"), ("distill", "learning_rate", 2.0),
    ],
)  # fmt: skip
def test_an_option_that_is_too_large_is_refused(method: str, name: str, value: object) -> None:
    with pytest.raises(LoraSuiteError, match=f"{name}: an option is out of range"):
        make_options(find(method), {name: value})


def test_factors_that_no_training_gives_are_refused(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every value is finite; the update would not be."""
    huge = shutil.copytree(pair.adapter, tmp_path / "huge")
    tensors = {name: 1e35 * one for name, one in load_file(huge / WEIGHTS).items()}
    save_file(tensors, huge / WEIGHTS)
    call = ["upgrade", huge, "--to", pair.new, "--map", pair.map, "-o", tmp_path / "place" / "out"]
    error = refused(tmp_path, capsys, *call, "--method", "lorasuite", "--set", "gain=1e6")
    assert "the adapter's values are out of range" in error
