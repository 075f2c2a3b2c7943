"""An upgrade of a planted pair as a user makes it, and its error in the logits."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from canon import Canon, read, write
from pico import MINICPM, pico_tokenizer, save_backbone
from planted import CHANGES, NEW_WORDS, OLD_WORDS, replicated_groups
from torch import Tensor

from peft_lorasuite import Backbone, PeftModel, UpgradeMap
from peft_lorasuite.arch.experts import PARAMETERS
from peft_lorasuite.arch.layout import group_of, join, split
from peft_lorasuite.arch.spec import Architecture, Heads
from peft_lorasuite.text.vocabulary import shared_tokens

SHARED_WORDS = [word for word in OLD_WORDS if word in NEW_WORDS]
TEXTS = [" ".join(random.Random(number).choices(SHARED_WORDS, k=40)) for number in range(6)]
"""Of words that both tokenizers know: random models do not put out the same for other cuts of a text."""


@dataclass(frozen=True)
class Case:
    """A planted upgrade: the old backbone's type, the changes in order, and the adapter."""

    name: str
    changes: tuple[str, ...]
    seed: int = 0
    values: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)


def planted(case: Case) -> tuple[Canon, Canon, Heads | None]:
    """Return old and new backbone, and the new heads if old groups are merged."""
    values = dict(case.values)
    if "rotated hidden" in case.changes:
        values["tie_word_embeddings"] = False
    generator = torch.Generator().manual_seed(case.seed)
    old = read(case.name, case.seed, **values)
    new, merged = old.copy(), None
    for change in case.changes:
        if change == "merged groups":
            merged = old.arch.heads
            replicated_groups(old, generator)
        else:
            CHANGES[change](new, generator)
    return old, new, merged


def save(folder: Path, canon: Canon, words: list[str]) -> Path:
    config = MINICPM | canon.values if canon.name == "minicpm" else None
    return save_backbone(folder, write(canon), pico_tokenizer(words), config)


def adapter(folder: Path, model: Any, arch: Architecture, case: Case, merged: Heads | None) -> Any:
    """Put a random LoRA on every linear module and the parameters of experts, save it, and return the model with it."""
    torch.manual_seed(case.seed)
    names = [arch.module(n, site) for n, site in arch.modules]
    conv1d = any(site.conv1d for site in arch.sites)
    lora = {"r": 3, "lora_alpha": 5, "fan_in_fan_out": conv1d} | case.lora
    if arch.experts:
        own = [f"{arch.experts.path}.{name}" for name in PARAMETERS]
        lora["target_parameters"] = [*own, f"{arch.experts.router}.weight"]
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=names, task_type="CAUSAL_LM", **lora))
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape) / 2)
                place = arch.find(name.removeprefix("base_model.model.").partition(".lora_B")[0])
                if place and merged and {"k", "v"} & set(place[1].parts):
                    site, own = place[1], arch.in_layer(place[0])
                    parts = {part: alike(rows, part, merged) for part, rows in split(weight, site, own).items()}
                    weight.copy_(join(parts, site, own))
    tuned.save_pretrained(folder)
    return tuned.eval()


def alike(rows: Tensor, part: str, heads: Heads) -> Tensor:
    """Make the updates of keys and values equal within the groups that are merged."""
    if part not in ("k", "v"):
        return rows
    blocks = rows.reshape(heads.query, -1, *rows.shape[1:])
    means = blocks.unflatten(0, (heads.key_value, heads.group)).mean(dim=1)
    return means[group_of(heads)].reshape(rows.shape)


@torch.no_grad()
def error(case: Case, folder: Path, *, built_in: bool = False, device: str = "cpu", dtype: str = "float32") -> float:
    """Upgrade as a user does; return the error in the logits of the shared tokens relative to the adapter's effect.

    The right logits are those of float32 on the CPU; the backbones of the upgrade run on the device, in the dtype.
    """
    old, new, merged = planted(case)
    words = NEW_WORDS if "vocabulary" in case.changes else OLD_WORDS
    left, right = save(folder / "old", old, OLD_WORDS), save(folder / "new", new, words)
    ids = shared_tokens(
        pico_tokenizer(OLD_WORDS), pico_tokenizer(words), old_rows=old.arch.vocabulary, new_rows=new.arch.vocabulary
    )
    order = torch.randint(len(ids[0]), (2, 24), generator=torch.Generator().manual_seed(case.seed))
    plain = write(old)(ids[0][order]).logits[..., ids[0]]
    unchanged = write(new)(ids[1][order]).logits[..., ids[1]]
    tuned = adapter(folder / "adapter", write(old), old.arch, case, merged)(ids[0][order]).logits[..., ids[0]]
    effect = tuned - plain
    assert (unchanged - plain).norm() < 1e-4 * plain.norm(), "the planted backbone computes something else"
    assert effect.norm() > 0.05 * plain.norm()
    sides = [Backbone.open(side, device_map=device, dtype=dtype) for side in (left, right)]
    upgrade_map = None if built_in else UpgradeMap.build(*sides, calibration=TEXTS)
    model = PeftModel.from_upgraded(sides[1], folder / "adapter", source_model=sides[0], upgrade_map=upgrade_map)
    reached = model(ids[1][order].to(model.device)).logits.cpu().float()
    return float((reached[..., ids[1]] - tuned).norm() / effect.norm())
