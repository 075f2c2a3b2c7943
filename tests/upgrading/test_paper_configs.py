"""The backbones of the paper's pairs, by the shape facts of their published config.json."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from peft_lorasuite.arch.spec import Architecture, Heads
from peft_lorasuite.models.backbone import Backbone

CONFIGS = Path(__file__).parents[1] / "fixtures" / "configs"
EXPECTED = {  # family, layers, hidden, (query heads, key/value heads, size), intermediate, vocabulary
    "Llama-2-13b": ("llama", 40, 5120, (40, 40, 128), 13824, 32000),
    "Llama-2-7b": ("llama", 32, 4096, (32, 32, 128), 11008, 32000),
    "Llama-3-8b": ("llama", 32, 4096, (32, 8, 128), 14336, 128256),
    "MiniCPM-2B": ("minicpm", 40, 2304, (36, 36, 64), 5760, 122753),
    "MiniCPM-S-1B": ("minicpm", 52, 1536, (24, 8, 64), 3840, 73440),
    "Phi-1.5": ("phi", 24, 2048, (32, 32, 64), 8192, 51200),
    "Phi-2": ("phi", 32, 2560, (32, 32, 80), 10240, 51200),
    "Qwen1.5-1.8B": ("qwen2", 24, 2048, (16, 16, 128), 5504, 151936),
    "Qwen2.5-3B": ("qwen2", 36, 2048, (16, 2, 128), 11008, 151936),
    "Yi-1.5-9B": ("llama", 48, 4096, (32, 4, 128), 11008, 64000),
    "Yi-6B": ("llama", 32, 4096, (32, 4, 128), 11008, 64000),
    "bloom-560m": ("bloom", 24, 1024, (16, 16, 64), 4096, 250880),
    "bloomz-1b1": ("bloom", 24, 1536, (16, 16, 96), 6144, 250880),
    "pythia-1.4b": ("gpt_neox", 24, 2048, (16, 16, 128), 8192, 50304),
    "pythia-1b": ("gpt_neox", 16, 2048, (8, 8, 256), 8192, 50304),
    "pythia-410m": ("gpt_neox", 24, 1024, (16, 16, 64), 4096, 50304),
}
"""What the architecture must say; the number of weights below is checked against the models' names."""
BILLIONS = {
    "Llama-2-13b": 13.0,
    "Llama-2-7b": 6.7,
    "Llama-3-8b": 8.0,
    "MiniCPM-2B": 2.7,
    "MiniCPM-S-1B": 1.36,
    "Phi-1.5": 1.4,
    "Phi-2": 2.8,
    "Qwen1.5-1.8B": 1.84,
    "Qwen2.5-3B": 3.1,
    "Yi-1.5-9B": 8.8,
    "Yi-6B": 6.1,
    "bloom-560m": 0.56,
    "bloomz-1b1": 1.07,
    "pythia-1.4b": 1.41,
    "pythia-1b": 1.01,
    "pythia-410m": 0.41,
}
NAMES = pytest.mark.parametrize("name", EXPECTED)


def described(name: str, folder: Path) -> Architecture:
    shutil.copy(CONFIGS / f"{name}.json", folder / "config.json")
    return Backbone.open(str(folder)).arch


def test_every_config_has_its_facts() -> None:
    assert {path.stem for path in CONFIGS.glob("*.json")} == set(EXPECTED) == set(BILLIONS)


@NAMES
def test_the_shape_is_read_from_the_config(name: str, tmp_path: Path) -> None:
    arch = described(name, tmp_path)
    family, layers, hidden, heads, intermediate, vocabulary = EXPECTED[name]
    found = (arch.family, arch.layers, arch.hidden, arch.heads, arch.intermediate, arch.vocabulary)
    assert found == (family, layers, hidden, Heads(*heads), intermediate, vocabulary)


@NAMES
def test_the_weights_add_up_to_the_models_size(name: str, tmp_path: Path) -> None:
    arch = described(name, tmp_path)
    layer = sum(rows * columns for rows, columns in map(arch.shape, arch.parts))
    total = arch.layers * layer + arch.vocabulary * arch.hidden * (1 if arch.tied else 2)
    assert total / 1e9 == pytest.approx(BILLIONS[name], rel=0.02)


def test_details_that_only_some_have(tmp_path: Path) -> None:
    pythia, phi, sparse = (described(name, tmp_path) for name in ("pythia-1b", "Phi-2", "MiniCPM-S-1B"))
    assert (pythia.rotary_size, pythia.parallel, pythia.site("k").rows) == (64, True, "head part dim")
    assert (phi.rotary_size, phi.parallel, phi.site("o").bias) == (32, True, True)
    assert (sparse.tied, sparse.activation, sparse.activation_floor) == (True, "relu", 0.03)
    assert sparse.residual_scale == pytest.approx(1.4 / 52**0.5)
    assert dict(sparse.runs_as)["logits_scaling"] == 6.0
    bloom, llama3, qwen = (described(name, tmp_path) for name in ("bloom-560m", "Llama-3-8b", "Qwen2.5-3B"))
    assert (bloom.positions, bloom.tied, bloom.embedding_norm is not None) == ("alibi", True, True)
    assert (llama3.theta(0), llama3.heads.group) == (500000.0, 4)
    assert (qwen.tied, qwen.site("v").bias, qwen.site("o").bias) == (True, True, False)
