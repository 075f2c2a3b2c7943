"""All pairs of flags of the commands, and the same keywords of `from_upgraded` and `upgrade`, on pico models."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import command_fixtures
import peft
import pytest
import torch
from command_fixtures import Pair
from pairwise import pairwise_rows
from transformers import AutoModelForCausalLM

from peft_lorasuite import PeftModel, UpgradeMap, upgrade
from peft_lorasuite.cli.main import main

pair = command_fixtures.pair
pytestmark = pytest.mark.slow
METHODS = ("auto", "copy", "lorasuite", "cross-lora", "transplant", "distill")
SMALL = {"transplant": ["extra=50", "length=4"], "distill": ["extra=50", "length=4", "epochs=1"]}
UPGRADE: dict[str, tuple[Any, ...]] = {
    "--method": METHODS,
    "--map": (None, "map"),
    "--dtype": ("auto", "float32", "bfloat16"),
    "--device-map": (None, "cpu"),
    "--prompts": (None, "prompts"),
    "--from": (None, "old"),
    "--finetune": (None, "data"),
    "--rank": (None, "3"),
    "--output-type": ("same", "lora"),
    "--seed": ("0", "7"),
    "output": ((), ("--json",), ("--quiet",)),
    "--overwrite": (False, True),
}
MAP: dict[str, tuple[Any, ...]] = {
    "--hidden-map": ("embeddings", "polar"),
    "--similarity": ("cka", "cca", "pwcca", "procrustes"),
    "--layer-map": ("cka", "first", "medium", "last", "proportional"),
    "--head-map": ("hungarian", "index"),
    "--methods": (None, "cross-lora"),
    "--dtype": ("auto", "float32", "bfloat16"),
    "placement": ((), ("--low-memory",), ("--device-map", "cpu")),
    "--seed": ("0", "7"),
    "--tokens": ("64", "200"),
}
FINETUNE: dict[str, tuple[Any, ...]] = {
    "--samples": ("2", "100"),
    "--epochs": ("1", "2"),
    "sizes": ((), ("--batch-size", "4", "--micro-batch-size", "2")),
    "--warmup": ("0", "0.1"),
    "--cutoff": ("8", "256"),
    "--template": (None, "{instruction}\n{input}"),
    "--new-layers": ("train", "freeze"),
    "--base": (None, "old"),
    "--seed": ("0", "7"),
    "--dtype": ("auto", "float32", "bfloat16"),
    "--device-map": (None, "cpu"),
    "--trust-remote-code": (False, True),
}


def run(*words: Any) -> int:
    return main([str(word) for word in words])


def words_of(row: dict[str, Any], places: dict[str, Any]) -> list[str]:
    """Turn a row into arguments; values that name a place stand for its path."""
    words: list[str] = []
    for flag, value in row.items():
        if isinstance(value, tuple):
            words += value
        elif value is True:
            words.append(flag)
        elif value not in (None, False):
            words += [flag, str(places.get(value, value))]
    return words


def test_the_rows_cover_every_pair_of_values():
    rows = pairwise_rows(UPGRADE)
    for one, other in combinations(UPGRADE, 2):
        seen = {(row[one], row[other]) for row in rows}
        assert seen == {(a, b) for a in UPGRADE[one] for b in UPGRADE[other]}


@pytest.fixture(scope="module")
def kept_maps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hf_home")


@pytest.fixture(autouse=True)
def _own_map_cache(kept_maps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Build the map of the pair once for all rows."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HOME", str(kept_maps))


@pytest.fixture
def places(pair: Pair, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "prompts.txt").write_text("\n".join(f"the {word} cat" for word in ("red", "blue", "old", "new") * 4))
    return {"map": pair.map, "old": pair.old, "data": pair.data, "prompts": tmp_path / "prompts.txt"}


def named(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"argvalues": rows, "ids": [str(number) for number in range(len(rows))]}


@pytest.mark.parametrize("row", **named(pairwise_rows(UPGRADE)))
def test_upgrade_with_all_pairs_of_flags(row, pair, places, tmp_path, capsys):
    out = tmp_path / "out"
    if row["--overwrite"]:
        assert run("upgrade", pair.adapter, "--to", pair.new, "--map", pair.map, "--method", "copy", "-o", out) == 0
        capsys.readouterr()
    chosen = [word for option in SMALL.get(row["--method"], []) for word in ("--set", option)]
    assert run("upgrade", pair.adapter, "--to", pair.new, "-o", out, *chosen, *words_of(row, places)) == 0
    printed = capsys.readouterr().out
    if row["output"] == ("--json",):
        assert json.loads(printed)["output"] == str(out)
    assert bool(printed) == (row["output"] != ("--quiet",))
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pair.new), out)
    assert torch.isfinite(model(torch.tensor([[3, 4, 5]])).logits).all()


@pytest.mark.parametrize(
    "row",
    **named(
        pairwise_rows(
            {k: v for k, v in UPGRADE.items() if k not in ("--method", "--finetune", "--prompts", "--overwrite")}
        )
    ),
)
def test_distill_with_all_pairs_of_flags(row, pair, places, tmp_path):
    small = [word for option in SMALL["distill"] for word in ("--set", option)]
    call = ["distill", pair.adapter, "--to", pair.new, "-o", tmp_path / "out", "--prompts", places["prompts"]]
    assert run(*call, *small, *words_of(row, places)) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("row", **named(pairwise_rows(MAP)))
def test_map_with_all_pairs_of_flags(row, pair, tmp_path):
    assert run("map", pair.old, pair.new, "-o", tmp_path / "map", *words_of(row, {})) == 0
    found = UpgradeMap.load(tmp_path / "map")
    assert ("svd" in found.sections) == (row["--methods"] == "cross-lora")


@pytest.mark.parametrize("row", **named(pairwise_rows(FINETUNE)))
def test_finetune_with_all_pairs_of_flags(row, pair, places, tmp_path, capsys):
    code = run("finetune", pair.adapter, "--data", pair.data, "-o", tmp_path / "out", *words_of(row, places))
    if code:  # a cutoff may leave no response
        error = capsys.readouterr().err
        assert row["--cutoff"] == "8"
        assert "cutoff" in error.splitlines()[-1]
        assert not (tmp_path / "out").exists()
    else:
        assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


KEYWORDS: dict[str, tuple[Any, ...]] = {
    "method": METHODS,
    "upgrade_map": (None, "map"),
    "dtype": ("auto", "float32", "bfloat16", torch.float32),
    "device_map": (None, "cpu"),
    "prompts": (None, ["the red cat", "the blue cat", "the old cat", "the new cat"] * 3),
    "source_model": (None, "old"),
    "rank": (None, 3),
    "output_type": ("same", "lora"),
    "is_trainable": (False, True),
    "low_memory": (False, True),
}


@pytest.mark.parametrize("row", **named(pairwise_rows({k: tuple(range(len(v))) for k, v in KEYWORDS.items()})))
def test_from_upgraded_with_all_pairs_of_keywords(row, pair, places):
    chosen = {name: KEYWORDS[name][index] for name, index in row.items()}
    chosen |= {name: places[chosen[name]] for name in ("upgrade_map", "source_model") if chosen[name] is not None}
    options = dict(option.split("=") for option in SMALL.get(chosen["method"], [])) or None
    model = PeftModel.from_upgraded(pair.new, pair.adapter, options=options, **chosen)
    assert any(weight.requires_grad for weight in model.parameters()) == chosen["is_trainable"]
    assert torch.isfinite(model(torch.tensor([[3, 4, 5]])).logits).all()
    given = {name: chosen[name] for name in ("method", "prompts", "rank", "output_type")}
    if chosen["upgrade_map"] is not None and chosen["dtype"] == "float32" and chosen["method"] == "lorasuite":
        again = upgrade(pair.adapter, pair.map, options=options, old=pair.old, new=pair.new, **given)
        assert again.report.method == model.upgrade_report.method  # pyright: ignore[reportAttributeAccessIssue]
