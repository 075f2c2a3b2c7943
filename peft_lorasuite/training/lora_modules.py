"""Adding LoRA modules to a PEFT model that already has some."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

from ..errors import LoraSuiteError


def add_modules(
    model: Any, *, fill: bool = False, modules: Sequence[str] = (), paths: Sequence[str] = ()
) -> list[str]:  # fmt: skip
    """Add new LoRA modules to a PEFT model, in place.

    Args:
        model: The PEFT model.
        fill: Whether layers without any LoRA get the modules that other layers have. They do not if the adapter's
            config selects its layers (``layers_to_transform``).
        modules: Last names of modules that get a LoRA in every layer.
        paths: Full names of further modules that get one.

    Returns:
        Names of the modules that were added.

    Raises:
        LoraSuiteError: If no layer has a linear module of a name in ``modules``.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from peft.functional import cast_adapter_dtype

    config = model.peft_config[model.active_adapter]
    missing = _missing_modules(model, fill and getattr(config, "layers_to_transform", None) is None, modules)
    known = {*missing, *(name for name, _ in _lora_modules(model))}
    missing += [path for path in paths if path not in known]
    if not missing:
        return []
    kept = {
        name: tensor.clone() for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    present = [name for name, _ in _lora_modules(model)]
    config.target_modules = {*present, *missing}
    model.base_model.inject_adapter(model.get_base_model(), model.active_adapter)
    cast_adapter_dtype(model, model.active_adapter)  # injection creates all factors again, in the backbone's dtype
    set_peft_model_state_dict(model, kept, adapter_name=model.active_adapter)
    return missing


def _missing_modules(model: Any, fill: bool, modules: Sequence[str]) -> list[str]:
    """Return the names of the modules to add; see `add_modules`."""
    matches = [re.fullmatch(r"(.+?)\.(\d+)\.(.+)", name) for name, _ in _lora_modules(model)]
    found = [(match[1], int(match[2]), match[3]) for match in matches if match is not None]
    inner = model.get_base_model()
    missing: list[str] = []
    known: set[str] = set()
    for stack in sorted({stack for stack, _, _ in found}):
        filled = {layer for own_stack, layer, _ in found if own_stack == stack}
        paths = sorted({path for own_stack, _, path in found if own_stack == stack}) if fill else []
        for index, layer in enumerate(inner.get_submodule(stack)):
            wanted = [path for path in paths if index not in filled and _has_module(inner, f"{stack}.{index}.{path}")]
            linear = _linear_modules(layer)
            known |= {name.removesuffix(".base_layer").rpartition(".")[2] for name in linear}
            wanted += [name for name in linear if name.rpartition(".")[2] in modules and name not in wanted]
            missing += [f"{stack}.{index}.{name}" for name in wanted]
    if isinstance(modules, str) or set(modules) - known:
        names = f"a list of {', '.join(sorted(known)) or 'none'}"
        raise LoraSuiteError("no layer has such a linear module", where="modules", got=repr(modules), wanted=names)
    return missing


def _linear_modules(layer: torch.nn.Module) -> list[str]:
    """Names of a layer's linear modules, without the factors of a LoRA."""
    from transformers.pytorch_utils import Conv1D

    kinds = (torch.nn.Linear, Conv1D)
    return [name for name, part in layer.named_modules() if isinstance(part, kinds) and ".lora_" not in name]


def _has_module(module: torch.nn.Module, name: str) -> bool:
    try:
        module.get_submodule(name)
    except AttributeError:
        return False
    return True


def _lora_modules(model: Any) -> list[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return [(name, part) for name, part in model.get_base_model().named_modules() if isinstance(part, LoraLayer)]
