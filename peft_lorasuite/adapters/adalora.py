"""AdaLoRA: an update as orthogonal factors with singular values, each module at a rank of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..linalg.lowrank import LowRank

SCHEDULE = (
    "init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step", "lora_alpha"
)  # fmt: skip
"""What is taken over from the source: its ranks, scaling and how it was pruned."""


def unfolded(update: LowRank, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Take a balanced update apart: ``B (E * A)`` times alpha over the first rank is the update again.

    A direction whose value is zero keeps a seeded B, so that it can learn.
    """
    left, right = update.B.norm(dim=0), update.A.norm(dim=1)
    silent = left * right == 0
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(update.B.shape, generator=generator) / len(update.B) ** 0.5
    B = torch.where(silent, noise, update.B / left.clamp(min=1e-30))
    A = update.A / right.clamp(min=1e-30)[:, None]
    values = left * right * ((config["init_r"] + 1e-5) / config["lora_alpha"])
    return {"lora_A": A, "lora_B": B, "lora_E": values[:, None]}


def peft_config(modules: Mapping[str, LowRank], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an AdaLoRA's config has of its own; the rank pattern masks what a module has less than ``init_r``."""
    first = config["init_r"]
    pattern = {
        f"{name}.lora_E": [number < update.rank for number in range(first)]
        for name, update in modules.items() if update.rank < first
    }  # fmt: skip
    return {name: config[name] for name in SCHEDULE if name in config} | {"rank_pattern": pattern or None}
