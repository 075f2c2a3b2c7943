"""An adapter that changes nothing is reported, of whatever type and by whatever method (A1 of the real inputs)."""

from __future__ import annotations

from typing import Any

import added
import peft
import pytest
import torch
from added import identity_map
from safetensors.torch import load_file, save_file
from versions import needs

from peft_lorasuite import upgrade

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
NAMES = ["q_proj", "v_proj", "down_proj"]
UNTRAINED: dict[str, Any] = {
    "LoRA": peft.LoraConfig(r=4, target_modules=NAMES),
    "rsLoRA": peft.LoraConfig(r=4, target_modules=NAMES, use_rslora=True),
    "LoRA of the embedding": peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]),
    "DoRA": peft.LoraConfig(r=4, target_modules=NAMES, use_dora=True),
    "AdaLoRA": peft.AdaLoraConfig(init_r=4, target_r=2, target_modules=NAMES, total_step=10),
    "LoHa": peft.LoHaConfig(r=4, target_modules=NAMES),
    "LoKr": peft.LoKrConfig(r=4, target_modules=NAMES),
    "IA3": peft.IA3Config(target_modules=NAMES, feedforward_modules=["down_proj"]),
    "VeRA": peft.VeraConfig(r=4, target_modules=["q_proj"]),
    "OFT": peft.OFTConfig(r=0, oft_block_size=4, target_modules=NAMES, use_cayley_neumann=False),
    "trained tables that were not trained": peft.LoraConfig(
        r=4, target_modules=NAMES, modules_to_save=["embed_tokens", "lm_head"]
    ),
}
TRAINED = {
    "a DoRA's magnitudes": ("DoRA", "lora_magnitude_vector", 1.1),
    "a table": ("trained tables that were not trained", "embed_tokens", 1.1),
}
SMALL = {"extra": 50, "length": 4}
PROMPTS = ["the cat sat on", "the dog ran to", "the red mat", "big sun in the"] * 4


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    home = tmp_path_factory.mktemp("pair")
    old = added.base(home / "old")
    new = added.base(home / "new", seed=2, hidden_size=40, num_attention_heads=4)
    return old, new, identity_map(old, new)


def untrained(old, folder, kind: str, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    model = peft.get_peft_model(old.model(), UNTRAINED[kind])
    model.save_pretrained(folder, save_embedding_layers=False)
    path = folder / "adapter_model.safetensors"
    save_file({name: value.to(dtype) for name, value in load_file(path).items()}, path)
    return folder


def verdict(pair, folder, method: str = "lorasuite") -> str:
    old, new, upgrade_map = pair
    options = SMALL | ({"epochs": 1} if method == "distill" else {}) if method in ("transplant", "distill") else None
    settings = {"method": method, "options": options, "old": old.folder, "new": new.folder, "prompts": PROMPTS}
    return upgrade(folder, upgrade_map, **settings).report.verdict


@pytest.mark.parametrize("kind", UNTRAINED)
def test_a1_an_untrained_adapter_of_any_type_is_reported(kind, pair, tmp_path):
    if kind == "VeRA":
        needs("peft", "0.21", "a VeRA with save_projection")
    found = verdict(pair, untrained(pair[0], tmp_path, kind))
    assert "the adapter changes nothing: was it trained?" in found
    assert found.startswith("unlikely to hold")


@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_a1_rounding_is_not_training(kind, pair, tmp_path):
    assert "changes nothing" in verdict(pair, untrained(pair[0], tmp_path, kind, torch.bfloat16))


@pytest.mark.parametrize("method", ["copy", "cross-lora", "transplant", "distill"])
def test_a1_by_every_method(method, pair, tmp_path):
    assert "the adapter changes nothing" in verdict(pair, untrained(pair[0], tmp_path, "DoRA"), method)


@pytest.mark.parametrize("what", TRAINED)
def test_an_adapter_that_changes_something_else_is_not_reported(what, pair, tmp_path):
    kind, part, factor = TRAINED[what]
    folder = untrained(pair[0], tmp_path, kind)
    path = folder / "adapter_model.safetensors"
    tensors = {name: value * (factor if part in name else 1) for name, value in load_file(path).items()}
    save_file(tensors, path)
    assert "the adapter changes nothing" not in verdict(pair, folder)
