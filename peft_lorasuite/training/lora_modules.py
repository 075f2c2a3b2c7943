"""New LoRA modules in a PEFT model that already has some."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

import torch

from ..errors import LoraSuiteError

log = logging.getLogger(__name__)


def add_modules(model: Any, *, fill: bool, modules: Sequence[str] = ()) -> list[str]:
    """Give modules a new LoRA: in layers without any, those that other layers have; and ``modules`` in every layer.

    Layers are not filled where the adapter's own config chose them (``layers_to_transform``). Returns their names.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from peft.functional import cast_adapter_dtype

    config = model.peft_config[model.active_adapter]
    missing = _missing_modules(model, fill and getattr(config, "layers_to_transform", None) is None, modules)
    if not missing:
        return []
    kept = {
        name: tensor.clone() for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    present = [name for name, _ in _lora_modules(model)]
    config.target_modules = {*present, *missing}
    model.base_model.inject_adapter(model.get_base_model(), model.active_adapter)
    cast_adapter_dtype(model, model.active_adapter)  # injection makes all factors anew, in the backbone's dtype
    set_peft_model_state_dict(model, kept, adapter_name=model.active_adapter)
    log.info("%d modules without an old counterpart start as ordinary LoRA", len(missing))
    return missing


def _missing_modules(model: Any, fill: bool, modules: Sequence[str]) -> list[str]:
    places = [re.fullmatch(r"(.+?)\.(\d+)\.(.+)", name) for name, _ in _lora_modules(model)]
    found = [(place[1], int(place[2]), place[3]) for place in places if place is not None]
    inner = model.get_base_model()
    missing: list[str] = []
    known: set[str] = set()
    for stack in sorted({stack for stack, _, _ in found}):
        filled = {layer for where, layer, _ in found if where == stack}
        paths = sorted({path for where, _, path in found if where == stack}) if fill else []
        for number, layer in enumerate(inner.get_submodule(stack)):
            wanted = [path for path in paths if number not in filled and _has(inner, f"{stack}.{number}.{path}")]
            ends = _linear(layer)
            known |= {name.removesuffix(".base_layer").rpartition(".")[2] for name in ends}
            wanted += [name for name in ends if name.rpartition(".")[2] in modules and name not in wanted]
            missing += [f"{stack}.{number}.{name}" for name in wanted]
    if isinstance(modules, str) or set(modules) - known:
        names = f"a list of {', '.join(sorted(known)) or 'none'}"
        raise LoraSuiteError("a layer has no such linear module", where="modules", got=repr(modules), wanted=names)
    return missing


def _linear(layer: torch.nn.Module) -> list[str]:
    """Names of a layer's linear modules, but not those of a LoRA."""
    from transformers.pytorch_utils import Conv1D

    kinds = (torch.nn.Linear, Conv1D)
    return [name for name, part in layer.named_modules() if isinstance(part, kinds) and ".lora_" not in name]


def _has(module: torch.nn.Module, name: str) -> bool:
    try:
        module.get_submodule(name)
    except AttributeError:
        return False
    return True


def _lora_modules(model: Any) -> list[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return [(name, part) for name, part in model.get_base_model().named_modules() if isinstance(part, LoraLayer)]
