"""Adapters as PEFT saves them, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch


@torch.no_grad()
def write_random_adapter(backbone: Any, config: peft.PeftConfig, folder: Path) -> Any:
    """Save an adapter all of whose weights are random; return the model with it, in evaluation mode."""
    torch.manual_seed(0)
    model = peft.get_peft_model(backbone, config).eval()
    for weight in model.parameters():
        if weight.requires_grad:
            weight.add_(torch.randn_like(weight) * 0.1)
    model.save_pretrained(folder, save_embedding_layers=False)
    return model
