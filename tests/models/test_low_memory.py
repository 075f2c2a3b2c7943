"""Calibration with the layers on disk: the same map to the last bit, one layer in memory at a time, no copy."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import MINICPM, pico_model, pico_tokenizer, save_backbone

from peft_lorasuite import MapOptions, UpgradeMap
from peft_lorasuite.cli.main import main
from peft_lorasuite.errors import LoraSuiteError
from peft_lorasuite.models import activations
from peft_lorasuite.models.activations import Sampling, forward_pass, paired_activations
from peft_lorasuite.models.backbone import Backbone
from peft_lorasuite.upgrading.map_cache import load_or_build_map

WORDS = ["red", "blue", "tree", "stone", "river", "cloud", "small", "big", "runs", "sleeps"]
TEXTS = [" ".join(WORDS)] * 8
OPTIONS = MapOptions(tokens=60, block=20)
PAIRS = [("llama", "qwen2"), ("gpt_neox", "phi3"), ("bloom", "gemma2"), ("minicpm", "olmo2"), ("gpt2", "falcon")]


def folder(root: Path, family: str, seed: int, dtype: torch.dtype = torch.float32) -> Path:
    config = MINICPM if family == "minicpm" else None
    model = pico_model(family, seed).to(dtype)
    return save_backbone(root / f"{family}-{seed}", model, pico_tokenizer(WORDS), config=config)


def core(built: UpgradeMap, place: Path) -> bytes:
    return (built.save(place) / "core.safetensors").read_bytes()


@pytest.mark.parametrize(("old", "new"), PAIRS, ids=lambda name: name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["as stored", "converted"])
def test_the_map_is_the_same_to_the_last_bit(old: str, new: str, dtype: torch.dtype, tmp_path: Path) -> None:
    names = folder(tmp_path, old, 1, dtype), folder(tmp_path, new, 2, dtype)
    maps = [
        UpgradeMap.build(*names, OPTIONS, calibration=TEXTS, low_memory=low, dtype=torch.float32)
        for low in (False, True)
    ]
    assert maps[0].similarity.abs().max() > 0.01
    assert core(maps[0], tmp_path / "ordinary") == core(maps[1], tmp_path / "low")


def test_one_layer_is_in_memory_at_a_time_and_none_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    place, scratch = folder(tmp_path, "llama", 1), tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    with caplog.at_level(logging.WARNING):
        model = Backbone.open(place).load(device_map="disk")
    assert not caplog.records
    seen = []

    def count(module: Any, args: Any, output: Any) -> None:
        seen.append([sum(not weight.is_meta for weight in layer.parameters()) for layer in model.model.layers])

    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(count)
    forward_pass(model.base_model, {"input_ids": torch.arange(5)[None], "attention_mask": torch.ones(1, 5).long()})
    assert len(seen) == 3 * 7
    assert all(sum(held) <= 1 for held in seen)
    assert model.lm_head.weight.is_meta
    assert not any(scratch.iterdir())


def test_activations_beyond_the_budget_lie_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = folder(tmp_path, "llama", 1, torch.bfloat16), folder(tmp_path, "qwen2", 2)
    old, new = map(Backbone.open, names)
    held = paired_activations(old, new, TEXTS, Sampling(40))
    monkeypatch.setattr(activations, "BUDGET", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mapped = paired_activations(old, new, TEXTS, Sampling(40))
    for one, two in ((held.old, mapped.old), (held.new, mapped.new)):
        assert one.dtype == two.dtype
        assert torch.equal(one, two)
    kinds = ["file" if file_behind(side) else "memory" for pair in (held, mapped) for side in (pair.old, pair.new)]
    assert kinds == ["memory", "memory", "file", "file"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama-1", "qwen2-2"]


def file_behind(tensor: torch.Tensor) -> bool:
    """Whether the memory of a tensor is that of a file which has no name any more."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(end, 16) for end in line.split()[0].split("-"))
        if low <= tensor.data_ptr() < high:
            return line.endswith("(deleted)")
    return False


def test_a_kept_map_serves_whoever_asks_for_low_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old, new = map(Backbone.open, (folder(tmp_path, "llama", 1), folder(tmp_path, "qwen2", 2)))
    with caplog.at_level(logging.INFO, logger="peft_lorasuite"):
        maps = [load_or_build_map(old, new, OPTIONS, low_memory=low) for low in (True, False, True)]
    assert [record.message.split()[0] for record in caplog.records] == ["using", "using"]  # the first one built it
    assert all(torch.equal(maps[0].similarity, other.similarity) for other in maps[1:])


def test_a_device_map_beside_it_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = str(folder(tmp_path, "llama", 1)), str(folder(tmp_path, "qwen2", 2))
    with pytest.raises(LoraSuiteError, match="low_memory and device_map cannot be combined"):
        UpgradeMap.build(*names, low_memory=True, device_map="auto")
    assert main(["map", *names, "-o", str(tmp_path / "map"), "--low-memory", "--device-map", "auto", "--quiet"]) == 1
    assert "pass one of them" in capsys.readouterr().err
    assert not (tmp_path / "map").exists()
