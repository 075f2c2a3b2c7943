"""Context managers that undo what running and training change in the caller's model and process."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def restore_model(model: torch.nn.Module) -> Iterator[None]:
    """Restore a model when the context ends, also after an error.

    PEFT replaces modules, freezes parameters, and overwrites biases with an adapter's trained ones.
    """
    plain = not hasattr(model, "peft_config")
    modules = [(module, module.training, dict(module._modules)) for module in model.modules()]
    weights = [(weight, weight.requires_grad) for weight in model.parameters()]
    biases = [(weight, weight.detach().clone()) for name, weight in model.named_parameters() if name.endswith("bias")]
    try:
        yield
    finally:
        for module, training, children in modules:
            module.training = training
            module._modules.update(children)
        for weight, requires_grad in weights:
            weight.requires_grad_(requires_grad)
        for weight, value in biases:
            weight.data.copy_(value)
        if plain and hasattr(model, "peft_config"):
            del model.peft_config


@contextmanager
def fixed_seed(seed: int) -> Iterator[None]:
    """Seed torch, and restore the caller's random states of Python, NumPy and torch when the context ends."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)  # the Trainer seeds all three
        np.random.set_state(numpy)


DROPOUT = ("dropout", "layerdrop")
"""Ends of the names of rates, as attributes of modules and in configs."""


@contextmanager
def disable_dropout(model: Any) -> Iterator[None]:
    """Set all dropout rates to zero: those of layers, and those that modules pass to functions."""
    owners = [owner for module in model.modules() for owner in (module, getattr(module, "config", None))]
    rates = [(owner, name, rate) for owner in owners for name, rate in _rates(owner).items()]
    try:
        for owner, name, _ in rates:
            setattr(owner, name, 0.0)
        yield
    finally:
        for owner, name, rate in rates:
            setattr(owner, name, rate)


def _rates(owner: Any) -> dict[str, float]:
    """Return the rates of a dropout layer, of a module's attributes, or of its config (which Falcon reads)."""
    if isinstance(owner, torch.nn.Dropout):
        return {"p": owner.p}
    values = vars(owner) if hasattr(owner, "__dict__") else {}
    return {name: rate for name, rate in values.items() if name.endswith(DROPOUT) and isinstance(rate, float)}
