"""What `evaluate` is given by name and cannot load: one sentence, and no pickle is opened."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import command_fixtures
import pytest
import torch
from command_fixtures import Pair, refused
from safetensors.torch import load_file

from peft_lorasuite.errors import LoraSuiteError
from peft_lorasuite.evaluation.harness import evaluate

pytest.importorskip("lm_eval")

pair = command_fixtures.pair
ITEM = {"instruction": "is it? Answer format: true/false", "input": "", "output": "", "answer": "true"}


def strange(kind: str, base: Path, adapter: Path, place: Path) -> dict[str, Any]:
    """What is named: a copy of the model or of the adapter with a fault, or a place where there is none."""
    if kind in ("no model", "no adapter"):
        return {"model": place / "none"} if kind == "no model" else {"model": base, "adapter": place / "none"}
    if kind == "an adapter on an adapter":
        return {"model": adapter, "adapter": adapter}
    copied = adapter if kind in ("pickled adapter", "misfit", "unknown kind") else base
    shutil.copytree(copied, place / "copy")
    weights = place / "copy" / ("model.safetensors" if copied is base else "adapter_model.safetensors")
    if kind.startswith("pickled"):
        tensors = load_file(weights)
        weights.unlink()
        torch.save(tensors, place / "copy" / ("pytorch_model.bin" if copied is base else "adapter_model.bin"))
    elif kind == "unknown kind":
        config = json.loads((place / "copy" / "adapter_config.json").read_text())
        (place / "copy" / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "FOO"}))
    elif kind == "no tokenizer":
        (place / "copy" / "tokenizer.json").unlink()
    return {"model": place / "copy"} if copied is base else {"model": base, "adapter": place / "copy"}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("pickled model", "pytorch_model.bin: the weights are a pickle file, .* not read"),
        ("pickled adapter", "adapter_model.bin: the weights are a pickle file, .* not read"),
        ("no model", "model not found"),
        ("no adapter", "adapter not found"),
        ("misfit", "the adapter does not fit model .*size mismatch"),
        ("unknown kind", "the adapter does not fit model .*FOO"),
        ("an adapter on an adapter", "the model is an adapter"),
        ("no tokenizer", "the tokenizer cannot be loaded"),
    ],
)
def test_what_cannot_be_loaded_by_name_is_one_sentence(pair: Pair, tmp_path: Path, kind: str, message: str) -> None:
    (tmp_path / "boolq_test.json").write_text(json.dumps([ITEM]))
    with pytest.raises(LoraSuiteError, match=message) as info:
        evaluate(**strange(kind, pair.new, pair.adapter, tmp_path), suite="boolq", data=tmp_path)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    "words",
    [["--adapter", "base"], ["--adapter", "one", "--adapter", "one"], ["--against", "model"]],
    ids=["an adapter called base", "an adapter twice", "the model itself"],
)
def test_rows_of_one_name_are_refused(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info = refused(tmp_path, capsys, "evaluate", "model", *words, "-o", tmp_path / "place" / "out")
    assert "two rows would have the same name" in info


def test_items_that_no_tokenizer_takes_are_refused(pair: Pair, tmp_path: Path) -> None:
    broken = json.dumps([ITEM | {"instruction": f"\ud800{ITEM['instruction']}"}])
    for text, message in ((broken, "item 0, instruction: the text has a lone surrogate"), ("[" * 10**5, "recursion")):
        (tmp_path / "boolq_test.json").write_text(text)
        with pytest.raises(LoraSuiteError, match=message):
            evaluate(pair.new, suite="boolq", data=tmp_path)
