"""Upgrades from, to and between Gemma 4 models with shared keys and values, per-layer embeddings and layer scales."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pico import GEMMA4_SHARED, pico_model, pico_tokenizer, save_backbone
from planted import ADMITS, OLD_WORDS
from planted_run import TEXTS, Case, error
from safetensors import safe_open
from torch import Tensor

from peft_lorasuite import Backbone, MapOptions, UpgradeMap, upgrade
from peft_lorasuite.methods.behavior.states import last_projection
from peft_lorasuite.methods.behavior.targets import Head
from peft_lorasuite.model import attach

PLE = {"hidden_size_per_layer_input": 8}
TIED = {"attention_k_eq_v": True, "num_global_key_value_heads": 2}
CHANGES = tuple(change for change, names in ADMITS.items() if "gemma4_text" in names)
SAME_HEADS = tuple(one for one in CHANGES if one not in ("dead heads", "replicated groups", "merged groups"))
"""Where keys are values, another config value has their number of heads."""
VARIANTS = {
    "per-layer embeddings": (PLE, (*CHANGES, "permuted embeddings")),
    "keys are values": (TIED, SAME_HEADS),
    "shared keys and values": (GEMMA4_SHARED, tuple(one for one in CHANGES if one != "depth")),
    "all": (GEMMA4_SHARED | TIED, (*[one for one in SAME_HEADS if one != "depth"], "permuted embeddings")),
}
"""Configs, and the planted changes that they admit: more layers would change which of them share keys and values."""


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_changes_at_once_are_exact(variant: str, tmp_path: Path) -> None:
    values, changes = VARIANTS[variant]
    assert error(Case("gemma4_text", changes, 1, values), tmp_path) < 1e-4


def saved(folder: Path, name: str, **values: Any) -> Backbone:
    return Backbone.open(
        str(save_backbone(folder, pico_model(name, **values), pico_tokenizer(OLD_WORDS))), dtype="float32"
    )


def adapter_of(backbone: Backbone, folder: Path) -> Path:
    torch.manual_seed(0)
    modules = [backbone.arch.module(layer, site) for layer, site in backbone.arch.modules]
    config = peft.LoraConfig(r=3, target_modules=modules, init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(backbone.load(), config).save_pretrained(str(folder))
    return folder


SIDES = {
    "llama": ("llama", {}),
    "text": ("gemma4_text", {}),
    "tied": ("gemma4_text", TIED),
    "shared": ("gemma4_text", GEMMA4_SHARED | TIED),
    "multimodal": ("gemma4", {}),
}
TIED_REASON = "keys and values share a projection in one of this layer and layer 1, its match"
REASONS = {
    ("llama", "tied"): {"v": "gemma4 has no v projection in layer 1", "k": TIED_REASON},
    ("llama", "shared"): {"v": "gemma4 has no v projection in layer 2", "k": "gemma4 has no k projection in layer 2"},
    ("tied", "llama"): {"k": TIED_REASON},
    ("shared", "llama"): {"k": TIED_REASON, "ple_down": "llama has no ple_down projection"},
    ("text", "shared"): {"v": "gemma4 has no v projection in layer 1", "k": TIED_REASON},
}
"""Old and new side -> what is not transferred between layers of the same index, and why."""
PAIRS = [("llama", one) for one in SIDES if one != "llama"] + [(one, "llama") for one in SIDES if one != "llama"]
PAIRS += [("text", "shared"), ("shared", "tied")]


@pytest.mark.parametrize(("old", "new"), PAIRS)
def test_a_pair_runs_from_end_to_end(old: str, new: str, tmp_path: Path) -> None:
    """PEFT loads what is written whole, and every update is transferred or reported with the reason."""
    left, right = (saved(tmp_path / name, SIDES[name][0], **SIDES[name][1]) for name in (old, new))
    upgrade_map = UpgradeMap.build(left, right, MapOptions(tokens=96, block=32), calibration=TEXTS)
    upgrade_map.save(tmp_path / "map")
    source = adapter_of(left, tmp_path / "adapter")
    upgraded = upgrade(source, UpgradeMap.load(tmp_path / "map"), method="lorasuite")
    folder, ids = upgraded.save(tmp_path / "new"), torch.arange(12)[None]
    model = right.load()
    with torch.inference_mode():
        plain = model(ids).logits
        tuned = peft.PeftModel.from_pretrained(model, str(folder))
        logits = tuned(ids).logits
    assert torch.isfinite(logits).all()
    assert (logits - plain).norm() > 1e-3 * plain.norm()
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        written = {name.replace(".weight", ".default.weight") for name in file.keys()}  # noqa: SIM118 (no dict)
    assert written == {name for name, _ in tuned.named_parameters() if "lora_" in name}
    matched = {i for i, _ in upgrade_map.pairs}
    lost = {
        fate for name, fate in upgraded.report.tensors.items()
        if fate != "transferred" and int(name.partition(".layers.")[2].partition(".")[0]) in matched
    }  # fmt: skip
    wanted = REASONS.get((old, new), {})
    assert all(any(f"{part}: {reason}" in fate for fate in lost) for part, reason in wanted.items())
    assert bool(lost) == bool(wanted) or (old, new) == ("shared", "tied")


@pytest.mark.parametrize("values", [{}, PLE, GEMMA4_SHARED], ids=["plain", "ple", "shared"])
@torch.no_grad()
def test_a_change_of_the_last_projection_has_the_effect_on_the_logits_that_it_is_fitted_for(
    values: dict[str, Any], tmp_path: Path
) -> None:
    """The effect of a small change, across the last projection's output, through its norm and the layer scale."""
    backbone = saved(tmp_path, "gemma4_text", **values)
    model, ids = backbone.load(), torch.tensor([[5, 17, 40, 3, 99, 58, 7, 110]])
    head = Head(model, backbone)
    place, seen = last_projection(model, backbone, head), {}
    assert place is not None
    assert place.key == (backbone.arch.layers - 1, "ple_down" if values else "down")
    assert place.factor == pytest.approx(float(model.model.layers[-1].layer_scalar))
    module, norm = model.get_submodule(place.module), model.get_submodule(place.target)
    hooks = [module.register_forward_hook(lambda _, args, out: seen.update(y=out[0].clone()))]
    hooks += [norm.register_forward_pre_hook(lambda _, args: seen.update(h=args[0][0].clone()))]
    model(ids)
    for hook in hooks:
        hook.remove()
    y, h = seen["y"], seen["h"]
    change = 1e-2 * torch.randn(y.shape, generator=torch.Generator().manual_seed(0)) * y.norm(dim=1, keepdim=True)
    change -= y * (change * y).sum(dim=1, keepdim=True) / (y * y).sum(dim=1, keepdim=True)
    reached: list[Tensor] = []
    for sign in (1, -1):
        hook = module.register_forward_hook(lambda _, args, out, sign=sign: out + sign * change)
        reached.append(model(ids).logits[0])
        hook.remove()
    factor = place.factor * place.gain / y.pow(2).mean(dim=1, keepdim=True).sqrt()
    fitted = [head.logits(h + sign * factor * change) for sign in (1, -1)]
    wanted = fitted[0] - fitted[1]
    assert (reached[0] - reached[1] - wanted).norm() < 5e-3 * wanted.norm()


@torch.no_grad()
def _logits(model: Any, backbone: Backbone, prompts: list[str]) -> Tensor:
    return torch.stack([model(torch.tensor([backbone.tokenizer(one)["input_ids"]])).logits[0, -1] for one in prompts])


@pytest.mark.parametrize("values", [{}, GEMMA4_SHARED], ids=["plain", "shared"])
@pytest.mark.parametrize("old", ["llama", "gemma4_text"])
def test_transplant_brings_the_new_model_nearer_to_what_the_adapter_does(
    old: str, values: dict[str, Any], tmp_path: Path
) -> None:
    left = saved(tmp_path / "old", old, seed=1, **(values if old != "llama" else {}))
    right = saved(tmp_path / "new", "gemma4_text", seed=2, **values)
    prompts = [f" the {a} {b} {c}" for a in OLD_WORDS[3:6] for b in OLD_WORDS[6:10] for c in OLD_WORDS[10:13]]
    options = {"prompts": 24, "length": 4, "extra": 50, "anchor_tokens": 40, "teacher_weight": 0.0}
    options |= {"rank": 8 if values else 16}
    source = adapter_of(left, tmp_path / "adapter")
    upgrade_map = UpgradeMap.build(left, right, MapOptions(layer_map="first"))
    settings = {"method": "transplant", "options": options, "prompts": prompts}
    upgraded = upgrade(source, upgrade_map, old=left, new=right, **settings)
    facts = upgraded.report.facts["transplant"]
    assert facts["divergence_left"] < 0.9 * facts["divergence"]
    tuned = peft.PeftModel.from_pretrained(left.load(), str(source))
    moved = _logits(tuned, left, prompts) - _logits(left.load(), left, prompts)
    plain = _logits(right.load(), right, prompts)
    reached = _logits(attach(right.load(), upgraded), right, prompts)
    target = (plain + moved).log_softmax(-1)
    before, after = ((target.exp() * (target - one.log_softmax(-1))).sum(-1).mean() for one in (plain, reached))
    assert after < before
