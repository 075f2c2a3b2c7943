"""What depends on the device of a model: where its solves run, and how much of them fits its memory."""

from __future__ import annotations

from typing import Any

import torch

ROWS_ON_CPU = 32
"""Rows of logits over a whole vocabulary on a CPU. With 150,000 tokens they stay below 32 MB, above which glibc
requests every tensor from the system, which takes as long as the arithmetic."""
MOST_ROWS = 2048
ANSWERS_ON_CPU, MOST_ANSWERS = 64, 512
"""Answers that are generated at once."""
ROW_TENSORS = 12
"""Float32 tensors of the size of the logits that a step of the solve holds, with a margin."""


def solving_device(device: torch.device) -> torch.device:
    """Return where the states of a model on ``device`` are solved with: there, if it has float64, which MPS lacks."""
    return torch.device("cpu") if device.type in ("mps", "meta") else device


def free_memory(device: torch.device) -> int | None:
    """Return the free bytes of an accelerator; None for the CPU, and where its backend does not tell."""
    module: Any = getattr(torch, device.type, None)
    if device.type == "cpu" or not hasattr(module, "mem_get_info"):
        return None
    return int(module.mem_get_info(device)[0])


def rows_at_once(device: torch.device, tokens: int) -> int:
    """Return how many rows of logits over ``tokens`` tokens are computed at once: a quarter of the free memory."""
    free = free_memory(device)
    return ROWS_ON_CPU if free is None else max(1, min(MOST_ROWS, free // (4 * ROW_TENSORS * 4 * tokens)))


def answers_at_once(model: Any, tokens: int) -> int:
    """Return how many answers are generated at once, each of ``tokens`` tokens with its prompt.

    On an accelerator their keys and values take at most half of the free memory, as if every head had its own.
    """
    free, config = free_memory(model.device), model.config.get_text_config()
    layers, hidden = (getattr(config, name, None) for name in ("num_hidden_layers", "hidden_size"))
    if free is None or layers is None or hidden is None:
        return ANSWERS_ON_CPU
    return max(1, min(MOST_ANSWERS, free // (2 * 2 * layers * hidden * model.dtype.itemsize * tokens)))
