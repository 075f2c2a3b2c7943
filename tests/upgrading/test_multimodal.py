"""Text models of multimodal backbones, old and new: only the text part of an adapter moves (C10)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hub_pair import WORDS
from pico import VISION, pico_model, pico_tokenizer, save_backbone
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_lorasuite import LoraSuiteError, MapOptions, PeftModel, UpgradeMap
from peft_lorasuite.adapters.peft_model import load_with_adapter
from peft_lorasuite.adapters.reading import read_adapter
from peft_lorasuite.io.source import Source
from peft_lorasuite.models.backbone import Backbone

OPTIONS = MapOptions(layer_map="proportional")
IDS = torch.tensor([[1, 17, 40, 3, 99, 58, 7, 110]])
TEXT_MODELS = {"gemma3": "gemma3_text", "llava": "llama", "mistral3": "mistral", "qwen2_vl": "qwen2"}
"""Multimodal type -> type of its text model by itself."""
OTHER_MODULES = ["k_proj", "fc1", "qkv"]
"""Modules that vision towers have: ``k_proj`` with the sizes and the name of the text model's."""


def multimodal(family: str, seed: int = 0) -> Any:
    """A multimodal model whose vision tower has as many layers as the text model, of the same sizes."""
    return pico_model(family, seed, **({"vision_config": VISION | {"image_size": 8}} if family == "gemma3" else {}))


def twins(family: str) -> dict[str, Any]:
    """A multimodal model, and its text model by itself with the same weights."""
    whole = multimodal(family)
    text = pico_model(TEXT_MODELS[family], seed=1, rms_norm_eps=whole.config.get_text_config().rms_norm_eps)
    text.model.load_state_dict(whole.model.language_model.state_dict())
    text.lm_head.load_state_dict(whole.lm_head.state_dict())
    return {"multimodal": whole, "text": text}


def with_adapter(model: Any, folder: Path, base: Path, modules: list[str]) -> Tensor:
    """Write a random LoRA; return the logits with it."""
    torch.manual_seed(0)
    present = [name for name in modules if any(path.endswith(f".{name}") for path, _ in model.named_modules())]
    config = peft.LoraConfig(r=4, target_modules=present, init_lora_weights=False, task_type="CAUSAL_LM")
    model.config._name_or_path = model.name_or_path = str(base)
    tuned = peft.get_peft_model(model, config).eval()
    tuned.save_pretrained(folder, save_embedding_layers=False)
    with torch.no_grad():
        return tuned(IDS).logits


@pytest.mark.parametrize("old", ["multimodal", "text"])
@pytest.mark.parametrize("family", TEXT_MODELS)
def test_c10_between_a_multimodal_model_and_its_text_model_the_transfer_is_exact(
    family: str, old: str, tmp_path: Path
) -> None:
    new = {"multimodal": "text", "text": "multimodal"}[old]
    models = twins(family)
    for role, model in models.items():
        save_backbone(tmp_path / role, model, pico_tokenizer(WORDS))
    with torch.no_grad():
        plain = models[new](IDS).logits
    wanted = with_adapter(models[old], tmp_path / "adapter", tmp_path / old, ["v_proj", "down_proj", *OTHER_MODULES])
    built = UpgradeMap.build(tmp_path / old, tmp_path / new, OPTIONS)
    upgraded = PeftModel.from_upgraded(tmp_path / new, tmp_path / "adapter", upgrade_map=built, method="lorasuite")
    with torch.no_grad():
        torch.testing.assert_close(upgraded(IDS).logits, wanted, rtol=1e-3, atol=1e-4)
    assert (wanted - plain).abs().max() > 0.01
    info = upgraded.upgrade_report.tensors
    parts = {name: "language_model" in name or old == "text" for name in info}
    assert all((fate == "transferred") == parts[name] for name, fate in info.items())
    others = {fate for name, fate in info.items() if not parts[name]}
    towers = {"visual" if family == "qwen2_vl" else "vision_tower"} if old == "multimodal" else set()
    assert others == {f"not transferred: it belongs to {tower}, not to the text model" for tower in towers}
    changed = [name for name, module in upgraded.named_modules() if hasattr(module, "lora_A")]
    assert changed
    assert all(("language_model.layers" in name) == (new == "multimodal") for name in changed)
    assert not any("vis" in name for name in changed)


@pytest.mark.parametrize("family", TEXT_MODELS)
def test_c10_the_old_model_is_run_with_the_text_part(family: str, tmp_path: Path) -> None:
    folder = save_backbone(tmp_path / "old", multimodal(family), pico_tokenizer(WORDS))
    wanted = with_adapter(multimodal(family), tmp_path / "adapter", folder, ["v_proj", *OTHER_MODULES])
    assert any("vis" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    old = Backbone.open(folder, dtype="float32")
    adapter = read_adapter(Source(str(tmp_path / "adapter"), "adapter"), old.arch)
    with load_with_adapter(old, adapter) as model, torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("old", "new"), [("gemma3", "llava"), ("qwen2_vl", "gemma3")])
def test_c10_transplant_between_multimodal_models(old: str, new: str, tmp_path: Path) -> None:
    for seed, (role, family) in enumerate({"old": old, "new": new}.items()):
        save_backbone(tmp_path / role, multimodal(family, seed), pico_tokenizer(WORDS))
    with_adapter(multimodal(old), tmp_path / "adapter", tmp_path / "old", ["v_proj", *OTHER_MODULES])
    built = UpgradeMap.build(tmp_path / "old", tmp_path / "new", OPTIONS)
    prompts = [f"the {one} {two}" for one in WORDS for two in WORDS]
    upgraded = PeftModel.from_upgraded(
        tmp_path / "new", tmp_path / "adapter", upgrade_map=built, method="transplant", prompts=prompts,
        options={"prompts": 16, "length": 4},
    )  # fmt: skip
    changed = [name for name, module in upgraded.named_modules() if hasattr(module, "lora_A")]
    assert changed == ["base_model.model.model.language_model.layers.2.mlp.down_proj"]
    assert type(upgraded.base_model.model) is type(multimodal(new))


def test_c10_an_adapter_of_the_vision_tower_alone_says_so(tmp_path: Path) -> None:
    folder = save_backbone(tmp_path / "old", multimodal("llava"), pico_tokenizer(WORDS))
    with_adapter(multimodal("llava"), tmp_path / "adapter", folder, ["fc1"])
    with pytest.raises(LoraSuiteError, match=r"changes nothing in the text model \(got it belongs to vision_tower"):
        read_adapter(Source(str(tmp_path / "adapter"), "adapter"), Backbone.open(folder).arch)


TYPES: dict[str, Any] = {
    "LoHa": lambda modules: peft.LoHaConfig(r=4, alpha=4, target_modules=modules, init_weights=False),
    "DoRA": lambda modules: peft.LoraConfig(r=4, use_dora=True, target_modules=modules, init_lora_weights=False),
    "head": lambda modules: peft.LoraConfig(r=4, target_modules=[*modules, "lm_head"], init_lora_weights=False),
    "embedding": lambda modules: peft.LoraConfig(r=4, target_modules=[*modules, "embed_tokens"],
                                                 init_lora_weights=False),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")
@pytest.mark.parametrize("spelling", ["since transformers 4.52", "before transformers 4.52"])
@pytest.mark.parametrize("kind", TYPES)
def test_c10_other_types_of_a_multimodal_model(kind: str, spelling: str, tmp_path: Path) -> None:
    models, tokenizer = twins("gemma3"), pico_tokenizer(WORDS)
    for role, model in models.items():
        save_backbone(tmp_path / role, model, tokenizer)
    torch.manual_seed(0)
    tuned = peft.get_peft_model(models["multimodal"], TYPES[kind](["v_proj", "k_proj"])).eval()
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    ids = torch.tensor([[1, 5, 9, 20, 3, 31, 12, 7]])
    with torch.no_grad():
        wanted = tuned(ids).logits[..., : len(tokenizer)]  # rows without a token have no counterpart
    if spelling.startswith("before"):
        weights = tmp_path / "adapter" / "adapter_model.safetensors"
        save_file({older_name(name): tensor for name, tensor in load_file(weights).items()}, weights)
    built = UpgradeMap.build(tmp_path / "multimodal", tmp_path / "text", OPTIONS)
    upgraded = PeftModel.from_upgraded(
        tmp_path / "text", tmp_path / "adapter", source_model=tmp_path / "multimodal", upgrade_map=built,
        method="lorasuite",
    )  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(upgraded(ids).logits[..., : len(tokenizer)], wanted, rtol=1e-3, atol=1e-3)
    fates = {fate for name, fate in upgraded.upgrade_report.tensors.items() if "vision_tower" in name}
    assert fates == {"not transferred: it belongs to vision_tower, not to the text model"}


def older_name(name: str) -> str:
    """Return the name of a tensor of Gemma 3 as transformers had it before 4.52."""
    for now, before in {
        "model.model.language_model": "model.language_model.model", "model.model.vision_tower": "model.vision_tower",
        "base_model.model.lm_head": "base_model.model.language_model.lm_head",
    }.items():  # fmt: skip
        name = name.replace(now, before)
    return name
