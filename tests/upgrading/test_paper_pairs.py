"""The pairs of the paper, scaled down with their ratios kept: heads, groups, fused layout, depth, vocabularies."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pico import pico_tokenizer, randomize, save_backbone
from planted import NEW_WORDS, OLD_WORDS
from transformers import AutoConfig, AutoModelForCausalLM

from peft_lorasuite import MapOptions, UpgradeMap
from peft_lorasuite.arch.spec import Architecture
from peft_lorasuite.models.backbone import Backbone
from peft_lorasuite.upgrading.upgrade import upgrade

CONFIGS = Path(__file__).parents[1] / "fixtures" / "configs"
ROWS = 120
"""Rows of the old backbone's embedding; the new one has as many more as its vocabulary is larger."""
TEXTS = [" ".join(random.Random(n).choices([w for w in OLD_WORDS if w in NEW_WORDS], k=40)) for n in range(3)]
KEYS = {
    "layers": ("num_hidden_layers", "n_layer"),
    "heads": ("num_attention_heads", "n_head"),
    "groups": ("num_key_value_heads",),
    "hidden": ("hidden_size", "n_embed"),
    "intermediate": ("intermediate_size",),
    "vocabulary": ("vocab_size",),
    "scaled logits": ("dim_model_base",),
}
"""What the published configs call their sizes."""


@dataclass(frozen=True)
class Pair:
    """Two fixtures, and how their vocabularies stand to each other: ``same``, ``other``, or another ``marker`` too."""

    old: str
    new: str
    vocabulary: str = "same"


PAIRS = [
    Pair("Yi-6B", "Yi-1.5-9B"),
    Pair("pythia-1b", "pythia-1.4b"),
    Pair("bloom-560m", "bloomz-1b1"),
    Pair("Llama-2-7b", "Llama-3-8b", "other, with another marker"),
    Pair("Qwen1.5-1.8B", "Qwen2.5-3B"),
    Pair("MiniCPM-S-1B", "MiniCPM-2B", "other"),
    Pair("Phi-1.5", "Phi-2"),
    Pair("Llama-2-7b", "Llama-2-13b"),
    Pair("pythia-410m", "pythia-1b"),
]


def full(name: str, folder: Path) -> Architecture:
    folder.mkdir()
    shutil.copy(CONFIGS / f"{name}.json", folder / "config.json")
    return Backbone.open(str(folder)).arch


def divisors(old: Architecture, new: Architecture) -> dict[str, int]:
    """How many times smaller each size becomes on both sides: two heads of 8 dimensions and two layers at least."""
    counts = [side.heads.query for side in (old, new)] + [side.heads.key_value for side in (old, new)]
    heads = largest(gcd(*counts), min(old.heads.query, new.heads.query) // 2)
    size = min(old.heads.size, new.heads.size) // 8
    layers = largest(gcd(old.layers, new.layers), min(old.layers, new.layers) // 2)
    width = heads * size
    return {"layers": layers, "heads": heads, "groups": heads, "hidden": width, "intermediate": width,
            "scaled logits": width}  # fmt: skip


def largest(number: int, limit: int) -> int:
    """Largest divisor of a number up to a limit."""
    return next(value for value in range(min(number, limit), 0, -1) if number % value == 0)


def scaled(name: str, factors: dict[str, int], rows: int) -> dict[str, Any]:
    """Divide the sizes of a published config, under the names that it uses."""
    values = json.loads((CONFIGS / f"{name}.json").read_text())
    for size, aliases in KEYS.items():
        for key in aliases:
            if key in values:
                assert size == "vocabulary" or values[key] % factors[size] == 0
                values[key] = rows if size == "vocabulary" else values[key] // factors[size]
    return {name: value for name, value in values.items() if name != "torch_dtype"}


def made(folder: Path, values: dict[str, Any], tokenizer: Any, seed: int) -> Backbone:
    """Write a backbone of a config with random weights, under the config's own names."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    described = Backbone.open(str(folder))
    config = described.config
    if described.arch.runs_as:
        known = {name: value for name, value in values.items() if name != "auto_map"}
        config = AutoConfig.for_model(**(known | dict(described.arch.runs_as)))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomize(model, seed)
    return Backbone.open(str(save_backbone(folder, model, tokenizer, values)))


def pair_of(pair: Pair, folder: Path) -> tuple[Backbone, Backbone, Architecture, Architecture]:
    """Make both backbones of a pair; also return the full sizes' architectures."""
    old, new = full(pair.old, folder / "full old"), full(pair.new, folder / "full new")
    factors = divisors(old, new)
    rows = round(ROWS * new.vocabulary / old.vocabulary)
    marker = "▁" if "marker" in pair.vocabulary else "Ġ"
    words = OLD_WORDS if pair.vocabulary == "same" else NEW_WORDS
    left = made(folder / "old", scaled(pair.old, factors, ROWS), pico_tokenizer(OLD_WORDS, marker=marker), 0)
    right = made(folder / "new", scaled(pair.new, factors, rows), pico_tokenizer(words), 1)
    return left, right, old, new


def random_adapter(backbone: Backbone, folder: Path) -> Path:
    torch.manual_seed(0)
    arch = backbone.arch
    modules = [f"{arch.layer_path}.{n}.{site.path}" for n in range(arch.layers) for site in arch.sites]
    config = peft.LoraConfig(r=4, target_modules=modules, init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(backbone.load(dtype=torch.float32), config).save_pretrained(folder)
    return folder


def ratios(old: Architecture, new: Architecture) -> list[float]:
    """What scaling down leaves as it is."""
    sides = [(a.layers, a.hidden, a.heads.query, a.heads.key_value, a.heads.size, a.intermediate) for a in (old, new)]
    within = [share for a in (old, new) for share in (a.heads.group, a.intermediate / a.hidden,
              a.rotary_size / a.heads.size, a.heads.query * a.heads.size / a.hidden)]  # fmt: skip
    return [a / b for a, b in zip(*sides, strict=True)] + within


@pytest.mark.parametrize("pair", PAIRS, ids=[f"{pair.old}-{pair.new}" for pair in PAIRS])
def test_a_pair_of_the_paper_goes_through(pair: Pair, tmp_path: Path) -> None:
    left, right, old, new = pair_of(pair, tmp_path)
    assert ratios(left.arch, right.arch) == pytest.approx(ratios(old, new))
    assert (left.arch.family, right.arch.family) == (old.family, new.family)
    assert [site.rows for site in left.arch.sites] == [site.rows for site in old.sites]

    built = UpgradeMap.build(left, right, MapOptions(tokens=128, block=64), calibration=TEXTS)
    common = len(set(left.tokenizer.get_vocab()) & set(right.tokenizer.get_vocab()))
    assert built.facts["shared_tokens"] >= (common if pair.vocabulary != "same" else len(left.tokenizer.get_vocab()))
    upgraded = upgrade(random_adapter(left, tmp_path / "adapter"), built)
    matched = {i for i, _ in built.pairs}
    assert len(matched) == min(left.arch.layers, right.arch.layers)
    for name, fate in upgraded.report.tensors.items():
        layer = int(name.split(f"{left.arch.layer_path}.")[1].partition(".")[0])
        assert (fate == "transferred") == (layer in matched), name
        assert fate == "transferred" or "no new layer is matched" in fate

    ids = torch.arange(12)[None]
    model = right.load(dtype=torch.float32)
    with torch.inference_mode():
        plain = model(ids).logits
        logits = peft.PeftModel.from_pretrained(model, upgraded.save(tmp_path / "transferred"))(ids).logits
    assert torch.isfinite(logits).all()
    assert (logits - plain).norm() > 1e-3 * plain.norm()
