"""Modules that PEFT, or its conversion of adapters of transformers 4, takes for others."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

PREFIX = "base_model.model."


def modules_for_lora(model: Any, paths: Sequence[str]) -> set[str]:
    """Return the linear modules that PEFT gives a LoRA, and whose LoRA it reads as it was written.

    PEFT renames the modules and the tensors of an adapter as transformers renames those of older checkpoints. In a
    mixture of experts it replaces ``down_proj`` by the parameters of all experts, so that a shared expert of that name
    cannot have a LoRA; and some tensors get names that the model does not have, which PEFT leaves out.

    Args:
        model: A model of transformers without weights, which gets LoRA modules.
        paths: Names of its linear modules.
    """
    experts = names_of_experts(model, map(last_name, paths))
    kept = [path for path in paths if last_name(path) not in experts]
    kinds: dict[str, str] = {}
    for path in kept:  # all layers have the same names, and one of each is enough
        kinds.setdefault(_kind(path), path)
    lost = {_kind(path) for path in _lost(model, list(kinds.values()))}
    return {path for path in kept if _kind(path) not in lost}


def last_name(path: str) -> str:
    """Return the last component of a module's name."""
    return path.rpartition(".")[2]


def _kind(path: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".#", path)


def _lost(model: Any, paths: list[str]) -> list[str]:
    """Return the modules whose tensors PEFT does not find again in the names under which they are written."""
    import peft
    import torch

    if not paths:
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transposed weights, and of layers without weights
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=paths, r=1))
    shapes = {name: weight for name, weight in adapted.named_parameters() if ".lora_" in name}
    stored = {name.replace(".default.", "."): torch.empty_like(weight) for name, weight in shapes.items()}
    missing = set(peft.set_peft_model_state_dict(adapted, stored).missing_keys)
    return [path for path in paths if f"{PREFIX}{path}.lora_B.default.weight" in missing]


def names_of_experts(model: Any, names: Iterable[str]) -> set[str]:
    """Return those last names of modules that PEFT, in a model's config, takes for names of experts."""
    import peft

    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # before PEFT 0.19
        return set()

    def is_replaced(name: str) -> bool:
        config = peft.LoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # a part of a fused parameter without the others
            return True
        return name not in (config.target_modules or ())

    return {name for name in set(names) if is_replaced(name)}
