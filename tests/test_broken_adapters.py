"""Adapters that are damaged or made by hand: refused in one sentence, never carried as something else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import command_fixtures
import peft
import pytest
from command_fixtures import Pair, refused
from pico import pico_model
from safetensors.torch import load_file, save_file
from torch import Tensor

pair = command_fixtures.pair
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Tensors = dict[str, Tensor]


def adapter(folder: Path, pair: Pair, change: Callable[[Tensors], object] = len, **values: Any) -> Path:
    """Copy the pair's adapter with its tensors and config changed."""
    folder.mkdir()
    tensors = load_file(pair.adapter / WEIGHTS)
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / WEIGHTS)
    config = json.loads((pair.adapter / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | values))
    return folder


def call(pair: Pair, folder: Path, tmp_path: Path, *more: Any) -> list[Any]:
    return ["upgrade", folder, "--to", pair.new, "--map", pair.map, "-o", tmp_path / "place" / "out", *more]


def other_kind(folder: Path, pair: Pair, config: peft.PeftConfig) -> Path:
    """Save an adapter of another kind on the pair's old backbone."""
    model = peft.get_peft_model(pico_model("llama"), config)
    config.base_model_name_or_path = str(pair.old)
    model.save_pretrained(folder)
    return folder


def test_another_kind_that_lacks_tensors_is_refused(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """PEFT leaves its random initial values in their place."""
    loha = peft.LoHaConfig(r=2, alpha=3, target_modules=["q_proj"], init_weights=False, task_type="CAUSAL_LM")
    folder = other_kind(tmp_path / "loha", pair, loha)
    tensors = load_file(folder / WEIGHTS)
    save_file({name: value for name, value in tensors.items() if "hada_w1_a" not in name}, folder / WEIGHTS)
    told = refused(tmp_path, capsys, *call(pair, folder, tmp_path, "--method", "copy"))
    assert "the tensors are not those of a LOHA on the old backbone" in told
    assert "wanted base_model.model.model.layers.0.self_attn.q_proj.hada_w1_a.default and 2 more" in told


@pytest.mark.parametrize("kind", ["LOHA", "IA3", "LN_TUNING", "VERA"])
def test_lora_tensors_under_the_name_of_another_kind_are_refused(
    kind: str, pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = adapter(tmp_path / "adapter", pair, peft_type=kind, feedforward_modules=[])
    told = refused(tmp_path, capsys, *call(pair, folder, tmp_path, "--method", "copy"))
    assert "PEFT cannot load the adapter" in told or f"the tensors are not those of a {kind}" in told
    assert "name the backbone that it was trained on" in told


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
def test_a_kind_that_changes_no_linear_module_is_refused(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = peft.LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM")
    folder = other_kind(tmp_path / "norms", pair, config)
    told = refused(tmp_path, capsys, *call(pair, folder, tmp_path, "--method", "copy"))
    assert f"{folder}: the adapter changes no linear module" in told
    assert "train a LoRA on the new backbone" in told
