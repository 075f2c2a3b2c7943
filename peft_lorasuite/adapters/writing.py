"""The files of an adapter that this package made: PEFT's own two, its report and the record of its training."""

from __future__ import annotations

import copy
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from ..arch.layout import join
from . import adalora
from .adapter import Adapter, by_site, separate_storage
from .peft_format import CONFIG, PREFIX, WEIGHTS

REPORT = "lorasuite_report.json"
"""Beside the weights: what was transferred, and how."""
RECORD = "lorasuite_finetune.json"
"""Beside the weights: how they were trained."""


def write_peft_model(model: Any, folder: Path, weights: Any = None) -> None:
    """Write the active adapter as a plain PEFT folder, with the record of its training and its report if it has them.

    ``weights`` are the model's own, unless given whole because the model is spread over processes.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    name = str(model.active_adapter)
    tensors = get_peft_model_state_dict(model, weights, adapter_name=name, save_embedding_layers=False)
    save_file({key: tensor.cpu().contiguous() for key, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    config = copy.copy(model.peft_config[name])
    config.inference_mode = True
    config.save_pretrained(str(folder))
    report, record = getattr(model, "upgrade_report", None), getattr(model, "finetune_record", None)
    for file, value in ((REPORT, report and report.to_dict()), (RECORD, record)):
        if value is not None:
            (folder / file).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def state_dict(adapter: Adapter) -> dict[str, Tensor]:
    """Return the tensors of a PEFT adapter; every site's parts must be there (see upgrade)."""
    tensors = dict(adapter.extras)
    sites = by_site(adapter)
    biased = any(update.bias is not None for update in sites.values())
    for (layer, site), update in sites.items():
        module = f"{PREFIX}{adapter.arch.layer_path}.{layer}.{site.path}"
        if adapter.kind == "adalora":
            tensors |= {f"{module}.{end}": value for end, value in adalora.unfolded(update, adapter.config).items()}
            continue
        tensors[f"{module}.lora_A.weight"] = update.A
        tensors[f"{module}.lora_B.weight"] = update.B
        if biased:
            tensors[f"{module}.lora_B.bias"] = update.B.new_zeros(len(update.B)) if update.bias is None else update.bias
        if adapter.kind == "dora":
            rows = {part: adapter.magnitudes[layer, part] for part in site.parts}
            tensors[f"{module}.lora_magnitude_vector"] = join(rows, site, adapter.arch)
    return separate_storage(tensors)


def peft_config(adapter: Adapter, *, base: str, revision: str | None = None) -> dict[str, Any]:
    """Return PEFT's config as it is written: full module names, one r, alpha = r; AdaLoRA keeps its ranks and scaling.

    A plain dictionary: importing PEFT takes longer than an upgrade, and PEFT fills in its defaults when it reads.
    """
    sites = by_site(adapter)
    names = {f"{adapter.arch.layer_path}.{layer}.{site.path}": update for (layer, site), update in sites.items()}
    settings = dict(adapter.settings)
    rank = int(settings.pop("r", 0) or adapter.rank)
    common = {
        "peft_type": "ADALORA" if adapter.kind == "adalora" else "LORA",
        "peft_version": version("peft"),
        "target_modules": sorted([*names, *settings.pop("target_modules", [])]),
        "fan_in_fan_out": any(site.conv1d for _, site in sites),
        "task_type": adapter.config.get("task_type") or "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "bias": "none",
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        **settings,
    }
    if adapter.kind == "adalora":
        return common | adalora.peft_config(names, adapter.config)
    biased = any(update.bias is not None for update in sites.values())
    return common | {"r": rank, "lora_alpha": rank, "lora_bias": biased, "use_dora": adapter.kind == "dora"}


def write_adapter(adapter: Adapter, folder: Path, *, base: str, revision: str | None = None) -> None:
    """Write a plain PEFT folder into an existing, empty folder."""
    from safetensors.torch import save_file

    config = peft_config(adapter, base=base, revision=revision)
    save_file(state_dict(adapter), folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
