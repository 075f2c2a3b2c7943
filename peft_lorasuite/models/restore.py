"""What running and training change in a model and a process of somebody else's: for a while, then it is put back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def restore_model(model: torch.nn.Module) -> Iterator[None]:
    """Leave a model as it was found, whatever PEFT and training do to it, and even if that fails.

    PEFT puts layers of its own into it, freezes what it has, and writes an adapter's trained biases over its own.
    """
    plain = not hasattr(model, "peft_config")
    parts = [(part, part.training, dict(part._modules)) for part in model.modules()]
    weights = [(weight, weight.requires_grad) for weight in model.parameters()]
    biases = [(weight, weight.detach().clone()) for name, weight in model.named_parameters() if name.endswith("bias")]
    try:
        yield
    finally:
        for part, training, children in parts:
            part.training = training
            part._modules.update(children)
        for weight, wanted in weights:
            weight.requires_grad_(wanted)
        for weight, value in biases:
            weight.data.copy_(value)
        if plain and hasattr(model, "peft_config"):
            del model.peft_config


@contextmanager
def fixed_seed(seed: int) -> Iterator[None]:
    """Draw from a seed for a while; the caller's random numbers of Python, NumPy and torch go on where they were."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)  # the Trainer seeds all three
        np.random.set_state(numpy)


@contextmanager
def disable_dropout(model: Any) -> Iterator[None]:
    """Set every dropout rate to zero for a while: those of layers, and those that are handed to functions."""
    owners = [owner for part in model.modules() for owner in (part, getattr(part, "config", None))]
    rates = [(owner, name, rate) for owner in owners for name, rate in _rates(owner).items()]
    try:
        for owner, name, _ in rates:
            setattr(owner, name, 0.0)
        yield
    finally:
        for owner, name, rate in rates:
            setattr(owner, name, rate)


def _rates(owner: Any) -> dict[str, float]:
    """Return a dropout layer's rate, or those that a module keeps by name, or (Falcon) looks up in its config."""
    if isinstance(owner, torch.nn.Dropout):
        return {"p": owner.p}
    kept = vars(owner) if hasattr(owner, "__dict__") else {}
    return {name: rate for name, rate in kept.items() if name.endswith("_dropout") and isinstance(rate, float)}
