"""Peak anonymous memory of `map`: no term of depth beyond what is kept for each layer, and no whole copy of a model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from anonymous import peak
from pico import pico_tokenizer, save_backbone
from planted import OLD_WORDS
from transformers import AutoConfig, AutoModelForCausalLM

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is read from Linux's /proc")

HIDDEN, UNITS, VOCABULARY, TOKENS = 384, 1536, 4096, 1024
LAYER = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * UNITS
"""Weights of a layer: 2.4 million, 9.4 MB in float32."""
SHALLOW, DEEP = 8, 24
SLACK = 32 * 2**20
"""What two runs of one command may differ by; measured, with the heap of `peak`: 4 MB."""
FIXED = ["--hidden-map", "identity", "--layer-map", "proportional"]
LOW = ["--hidden-map", "identity", "--low-memory", "--dtype", "float32"]
MODES = {"weight part": FIXED, "low memory": LOW}


@pytest.fixture(scope="module")
def peak_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., int]:
    """Peak of `map` for two random bfloat16 models of some depth."""
    root = tmp_path_factory.mktemp("deep")
    text = root / "text.txt"
    text.write_text("\n\n".join(" ".join(OLD_WORDS * 4) for _ in range(30)))

    @cache
    def measure(depth: int, *options: str) -> int:
        names = [str(backbone(root / f"{depth}-{seed}", depth, seed)) for seed in (0, 1)]
        output = root / f"map-{depth}{''.join(options)}"
        return peak("map", *names, "-o", str(output), "--tokens", str(TOKENS), "--calibration", str(text), *options)

    return measure


def backbone(place: Path, depth: int, seed: int) -> Path:
    if not place.exists():
        config = AutoConfig.for_model(
            "llama", hidden_size=HIDDEN, intermediate_size=UNITS, num_hidden_layers=depth, num_attention_heads=6,
            vocab_size=VOCABULARY, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        save_backbone(place, model, pico_tokenizer(OLD_WORDS))
    return place


def due(depth: int, *, calibrated: bool) -> int:
    """Bytes that a map of some depth has to keep: activations of both models, their Gram matrices, the map itself."""
    activations = 2 * depth * TOKENS * HIDDEN * 4
    grams = 2 * depth * 256 * 256 * 8
    built = depth * (UNITS * (2 * 8 + 3 * 4) + 6 * 4 * 64 * 64 * 4 + 7 * 2 * HIDDEN * 4)
    return (activations + grams if calibrated else 0) + built


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_memory_does_not_grow_with_depth(mode: str, peak_of: Callable[..., int]) -> None:
    grown = peak_of(DEEP, *MODES[mode]) - peak_of(SHALLOW, *MODES[mode])
    owed = due(DEEP, calibrated=mode == "low memory") - due(SHALLOW, calibrated=mode == "low memory")
    assert grown < owed + SLACK
    assert owed + SLACK < (DEEP - SHALLOW) * 4 * LAYER  # one model's layers in float32 would not go unnoticed


@pytest.mark.slow
def test_the_ordinary_calibration_holds_the_model_and_low_memory_does_not(peak_of: Callable[..., int]) -> None:
    held = peak_of(DEEP, *[option for option in LOW if option != "--low-memory"]) - peak_of(DEEP, *LOW)
    assert held > 0.8 * DEEP * 4 * LAYER


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_memory_stays_below_the_bound(mode: str, peak_of: Callable[..., int]) -> None:
    assert peak_of(DEEP, *MODES[mode]) < 16 * LAYER + 2 * 2 * VOCABULARY * HIDDEN + 10**9
