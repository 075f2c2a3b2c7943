"""A planted pair with a trained adapter, and upgrades of it that should pass a check or fail it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from planted import OLD_WORDS
from planted_run import Case, planted, save

from peft_lorasuite import UpgradeMap, finetune, upgrade
from peft_lorasuite.models.backbone import Backbone

CASE = Case("llama", ("rotated hidden", "permuted heads", "units"))
WORDS = OLD_WORDS[:12]
ITEMS = [
    {"prompt": f"the {one} and the {other}:", "completion": f" {other} on {one}"}
    for one in ("cat", "dog", "mat", "sun") for other in ("cat", "dog", "mat", "sun") if one != other
]  # fmt: skip
OTHER_FORMAT = [{**item, "completion": f" a big red{item['completion']} in the sun"} for item in ITEMS]
"""The same answers inside a sentence."""


@dataclass(frozen=True)
class Checked:
    """Folders of the backbones, the old adapter and its upgrades, and the file of labels."""

    old: Path
    new: Path
    adapter: Path
    good: Path
    empty: Path
    copied: Path
    other_format: Path
    data: Path


def train(base: Path, items: list[dict[str, str]], folder: Path, epochs: int = 60) -> Path:
    """Train a LoRA on items until it answers them, and save it."""
    model = Backbone.open(base).load(dtype="float32")
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fresh = peft.get_peft_model(model, config)
    tokenizer: Any = Backbone.open(base).tokenizer
    finetune(fresh, items, samples=None, epochs=epochs, learning_rate=5e-3, batch_size=16, tokenizer=tokenizer)
    fresh.save_pretrained(folder)
    return folder


def build_map(old: Path, new: Path, text: Path) -> UpgradeMap:
    """Build the map of a pair on a file of text."""
    return UpgradeMap.build(str(old), str(new), calibration=text)


def make(home: Path) -> Checked:
    """Write everything."""
    canons = planted(CASE)[:2]
    old, new = (save(home / name, one, OLD_WORDS) for name, one in zip(("old", "new"), canons, strict=True))
    adapter = train(old, ITEMS, home / "adapter")
    text = home / "text.txt"
    text.write_text("\n\n".join(" ".join(WORDS[number:] + WORDS[:number]) * 3 for number in range(len(WORDS))))
    built = build_map(old, new, text)
    for name, method in (("good", "lorasuite"), ("copied", "copy")):
        upgrade(adapter, built, method=method, old=str(old), new=str(new)).save(home / name)
    empty = peft.get_peft_model(
        Backbone.open(new).load(dtype="float32"), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    empty.save_pretrained(home / "empty")
    train(new, OTHER_FORMAT, home / "other-format")
    (home / "labels.json").write_text(json.dumps(ITEMS))
    return Checked(
        old, new, adapter, home / "good", home / "empty", home / "copied", home / "other-format", home / "labels.json"
    )
