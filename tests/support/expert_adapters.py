"""Adapters of single experts' modules, as they were trained with transformers 4."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from pico import pico_model
from safetensors.torch import save_file
from torch import Tensor

from peft_lorasuite.models.backbone import Backbone
from peft_lorasuite.models.experts import read_expert, read_router

MODULES = {
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
}
"""Type -> path of the mixture and names of an expert's modules in transformers 4."""


def split_adapter(family: str, folder: Path) -> dict[tuple[int, int, str], Tensor]:
    """Write a LoRA of the routers and of each expert's modules; return what it adds to the weights."""
    mixture, modules = MODULES[family]
    generator, tensors, changes = torch.Generator().manual_seed(0), {}, {}
    backbone = Backbone.open(pico_model(family, 1))

    def add(key: tuple[int, int, str], path: str, shape: torch.Size) -> None:
        A, B = torch.randn(2, shape[1], generator=generator), torch.randn(shape[0], 2, generator=generator)
        path = f"base_model.model.model.layers.{key[0]}.{mixture}.{path}"
        tensors.update({f"{path}.lora_A.weight": A, f"{path}.lora_B.weight": B})
        changes[key] = 1.5 * B @ A

    for layer in range(3):
        add((layer, 0, "router"), "gate", read_router(backbone, layer).shape)
        for expert in range(3):
            for module, part in zip(modules, ("gate", "up", "down"), strict=True):
                add(
                    (layer, expert, part),
                    f"experts.{expert}.{module}",
                    read_expert(backbone, layer, expert, part).shape,
                )
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 3,
        "target_modules": ["gate", *modules],
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return changes
