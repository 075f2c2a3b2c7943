"""Planted pairs for the PEFT variants: a pico backbone, what it was changed into, and an adapter of any kind on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from canon import Canon, read, write
from pico import VOCABULARY, pico_tokenizer, save_backbone
from planted import CHANGES, NEW_ROWS, NEW_WORDS, OLD_WORDS
from torch import Tensor

from peft_lorasuite import PeftModel, UpgradeMap
from peft_lorasuite.mapping.upgrade_map import MapOptions
from peft_lorasuite.text.vocabulary import shared_tokens


@dataclass
class Pair:
    """Old and new backbone on disk and in memory, the tokens that they share, and their upgrade map."""

    old: Canon
    new: Canon
    left: Path
    right: Path
    ids: tuple[Tensor, Tensor]
    map: UpgradeMap


def pair(folder: Path, name: str, *changes: str, seed: int = 0, **values: Any) -> Pair:
    """Plant an upgrade and build its map, layers matched in order (depth is not among the changes here)."""
    generator = torch.Generator().manual_seed(seed)
    old = read(name, seed, **values)
    new = old.copy()
    for change in changes:
        CHANGES[change](new, generator)
    words = NEW_WORDS if "vocabulary" in changes else OLD_WORDS
    left = save_backbone(folder / "old", write(old), pico_tokenizer(OLD_WORDS))
    right = save_backbone(folder / "new", write(new), pico_tokenizer(words))
    rows = NEW_ROWS if "vocabulary" in changes else VOCABULARY
    ids = shared_tokens(pico_tokenizer(OLD_WORDS), pico_tokenizer(words), old_rows=VOCABULARY, new_rows=rows)
    return Pair(old, new, left, right, ids, UpgradeMap.build(left, right, MapOptions(layer_map="first")))


def trained(folder: Path, planted: Pair, config: Any, seed: int = 0) -> Any:
    """Put an adapter on the old backbone, draw all that training would change, save it, and return the model."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(write(planted.old), config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "ranknum" in name or not (weight.requires_grad or ".modules_to_save." in name):
                continue
            drawn = any(f"lora_{factor}" in name for factor in ("A", "B", "E"))
            weight.add_(torch.randn(weight.shape) * (0.3 if drawn else 0.3 * float(weight.std(unbiased=False)) or 0.3))
    model.save_pretrained(folder)
    return model.eval()


@torch.no_grad()
def logits(model: Any, ids: Tensor, seed: int = 1) -> Tensor:
    """Logits of the shared tokens for a random text of shared tokens."""
    order = torch.randint(len(ids), (2, 20), generator=torch.Generator().manual_seed(seed))
    return model(ids[order]).logits[..., ids]


def upgraded(folder: Path, planted: Pair, **settings: Any) -> Any:
    """Upgrade as a user does."""
    return PeftModel.from_upgraded(
        planted.right, folder, source_model=planted.left, upgrade_map=planted.map, method="lorasuite", **settings
    )


def error(planted: Pair, tuned: Any, new: Any) -> float:
    """Error in the logits relative to the adapter's own effect."""
    wanted = logits(tuned, planted.ids[0])
    effect = wanted - logits(write(planted.old), planted.ids[0])
    assert effect.norm() > 0.02 * wanted.norm(), "the adapter does nothing"
    return float((logits(new, planted.ids[1]) - wanted).norm() / effect.norm())
