"""Adapters of pico backbones with all that a program may refuse or drop."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftModel
from pico import pico_model, save_backbone
from torch import Tensor

KINDS: dict[str, Any] = {
    "lora": peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"]),
    "one layer": peft.LoraConfig(r=4, target_modules=["down_proj"], layers_to_transform=[2]),
    "lone k": peft.LoraConfig(r=4, target_modules=["k_proj", "up_proj"]),
    "rslora": peft.LoraConfig(r=4, lora_alpha=8, target_modules=["o_proj"], use_rslora=True),
    "ranks": peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 9}, alpha_pattern={"q_proj": 3}
    ),
    "dora": peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], use_dora=True),
    "adalora": peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["q_proj", "down_proj"]),
    "lora bias": peft.LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True),
    "embedding": peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]),
    "head": peft.LoraConfig(r=4, target_modules=["v_proj", "lm_head"]),
    "tokens": peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [22, 35]}),
    "full table": peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "loha": peft.LoHaConfig(r=2, alpha=2, target_modules=["q_proj"]),
}  # fmt: skip
"""Name -> config of an adapter; the tokens are some of the fixed text."""


def backbone(folder: Path, family: str = "llama", **values: Any) -> Path:
    """Write a pico backbone."""
    return folder if folder.exists() else save_backbone(folder, pico_model(family, **values))


def adapter(folder: Path, base: Path, kind: str | Any, seed: int = 0, scale: float = 0.2) -> Path:
    """Write an adapter of a backbone with random weights, as PEFT saves it; ``scale`` is that of its factors."""
    config = copy.deepcopy(KINDS[kind] if isinstance(kind, str) else kind)
    config.task_type = "CAUSAL_LM"
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of biases that cannot be merged, and of tied heads
        model = peft.get_peft_model(load(base), config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "ranknum" not in name and (weight.requires_grad or ".modules_to_save." in name):
                weight.add_(torch.randn(weight.shape) * (scale if "lora_" in name else scale / 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def load(base: Path) -> Any:
    """Load a backbone."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


@torch.no_grad()
def logits(base: Path, adapted: Path | None = None) -> Tensor:
    """Logits of a backbone for a fixed text, with an adapter as PEFT loads it."""
    model = load(base)
    if adapted is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(model, str(adapted)).eval()
    ids = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(3))
    return model(ids).logits


def distance(one: Tensor, other: Tensor, plain: Tensor) -> float:
    """Difference of two adapted models' logits, relative to what the adapter changes."""
    return float((one - other).norm() / (one - plain).norm())
