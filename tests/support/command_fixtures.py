"""A pair of pico backbones with an adapter on disk, as a user of the command line has them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pico import pico_model, pico_tokenizer, save_backbone

from peft_lorasuite.cli.main import main

WORDS = ["red", "blue", "green", "cat", "dog", "bird", "the", "and"]
ITEMS = [{"instruction": f"Name a {word}.", "output": f"the {word}"} for word in WORDS]
TEXT = "the red cat and the blue dog and the green bird. " * 6 + "\n\n"


@dataclass(frozen=True)
class Pair:
    """Folders and files."""

    old: Path
    new: Path
    adapter: Path
    map: Path
    data: Path
    text: Path


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Two Llamas that differ in depth and width, a LoRA on the old one that names it, and the map, built by `map`."""
    home = tmp_path_factory.mktemp("pair")
    tokenizer = pico_tokenizer(WORDS)
    old = save_backbone(home / "old", pico_model("llama"), tokenizer)
    wider = {"hidden_size": 40, "num_hidden_layers": 4, "intermediate_size": 64, "num_attention_heads": 4}
    new = save_backbone(home / "new", pico_model("llama", 1, **wider), tokenizer)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = peft.get_peft_model(pico_model("llama"), config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model.peft_config["default"].base_model_name_or_path = str(old)
    model.save_pretrained(home / "adapter", save_embedding_layers=False)
    (home / "data.json").write_text(json.dumps(ITEMS))
    (home / "text.txt").write_text(TEXT * 8)
    made = Pair(old, new, home / "adapter", home / "map", home / "data.json", home / "text.txt")
    call = ["map", old, new, "-o", made.map, "--calibration", made.text, "--tokens", 512, "--quiet"]
    assert main([str(word) for word in call]) == 0
    return made


def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    """Run a command that must fail; return its sentence after checking that it is one and that nothing was written."""
    place = tmp_path / "place"
    place.mkdir(exist_ok=True)
    kept = sorted(str(path) for path in place.rglob("*"))
    assert main([str(word) for word in (*words, "-q")]) == 1
    info = capsys.readouterr()
    assert info.out == ""
    assert info.err.startswith("peft-lorasuite: "), info.err
    assert info.err.count("\n") == 1
    assert sorted(str(path) for path in place.rglob("*")) == kept
    return info.err
