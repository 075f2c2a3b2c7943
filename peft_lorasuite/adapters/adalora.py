"""AdaLoRA: updates as factors with singular values, with a separate rank per module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..linalg.lowrank import LowRank

SCHEDULE = (
    "init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step", "lora_alpha"
)  # fmt: skip
"""Config entries that are copied from the source adapter: ranks, scaling and pruning schedule."""


def split_update(update: LowRank, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Split an update into AdaLoRA's tensors: ``B (E * A)`` times ``lora_alpha / init_r`` is the update.

    Directions with a singular value of zero get random entries in B, with a fixed seed, so that they can be trained.

    Returns:
        ``lora_A (rank, in)``, ``lora_B (out, rank)`` and ``lora_E (rank, 1)``.
    """
    left, right = update.B.norm(dim=0), update.A.norm(dim=1)
    zero = left * right == 0
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(update.B.shape, generator=generator) / len(update.B) ** 0.5
    B = torch.where(zero, noise, update.B / left.clamp(min=1e-30))
    A = update.A / right.clamp(min=1e-30)[:, None]
    values = left * right * ((config["init_r"] + 1e-5) / config["lora_alpha"])
    return {"lora_A": A, "lora_B": B, "lora_E": values[:, None]}


def adalora_entries(modules: Mapping[str, LowRank], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config entries that only AdaLoRA has; the rank pattern masks ranks from a module's own to ``init_r``.

    Args:
        modules: Full module name -> update.
        config: Config of the source adapter.
    """
    initial = config["init_r"]
    pattern = {
        f"{name}.lora_E": [number < update.rank for number in range(initial)]
        for name, update in modules.items() if update.rank < initial
    }  # fmt: skip
    return {name: config[name] for name in SCHEDULE if name in config} | {"rank_pattern": pattern or None}
