"""The files of an adapter: PEFT's config and weights, the report of its upgrade, the record of its training.

If tokens were added for it, its tokenizer is one of them.
"""

from __future__ import annotations

import copy
import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..arch.layout import join
from ..compat import require, unsaved_biases
from ..errors import LoraSuiteError, unknown_name_error
from ..linalg.lowrank import check_values
from .adalora import adalora_entries, split_update
from .adapter import Adapter, join_sites, separate_storage
from .experts import expert_tensors, target_parameters
from .peft_format import CONFIG, PREFIX, RECORD, REPORT, WEIGHTS


def write_peft_model(model: Any, folder: Path, weights: Any = None) -> None:
    """Write the active adapter of a model as a PEFT folder, with its report and training record if it has them.

    Args:
        model: The `peft.PeftModel`.
        folder: An existing, empty folder.
        weights: The full state dict, if the model is sharded over processes; else it is taken from the model.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    name, tokenizer = str(model.active_adapter), getattr(model, "adapter_tokenizer", None)
    tensors = get_peft_model_state_dict(
        model, weights, adapter_name=name, save_embedding_layers=tokenizer is not None and _has_lora_table(model)
    )
    tensors |= unsaved_biases(model, name, tensors)
    tensors = separate_storage({key: tensor.cpu() for key, tensor in tensors.items()})
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    config = copy.copy(model.peft_config[name])
    config.inference_mode = True
    config.save_pretrained(str(folder))
    _leave_out_defaults(folder / CONFIG, config)
    report, record = getattr(model, "upgrade_report", None), getattr(model, "finetune_record", None)
    for file, value in ((REPORT, report and report.to_dict()), (RECORD, record)):
        if value is not None:
            (folder / file).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


COMMON: dict[str, Any] = {
    "inference_mode": True,
    "bias": "none",
    "lora_dropout": 0.0,
    "modules_to_save": None,
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
}
"""Entries that every written config has. PEFT before 0.14 loads no config with an entry that it does not know, and
engines read some of these without a default; of PEFT's other entries only those with an effect are written."""
REQUIRED = (
    *COMMON, "peft_type", "task_type", "base_model_name_or_path", "revision", "target_modules", "r", "lora_alpha",
    "fan_in_fan_out", "use_dora",
)  # fmt: skip
"""Entries that are written even where they have PEFT's default."""


def _leave_out_defaults(file: Path, config: Any) -> None:
    """Rewrite a config that PEFT has written, without the version and without defaults that are not required."""
    values = json.loads(file.read_text(encoding="utf-8"))
    defaults = {
        field.name: field.default_factory() if field.default_factory is not MISSING else field.default
        for field in fields(config)
    }
    kept = {name: value for name, value in values.items()
            if name in REQUIRED or (name != "peft_version" and value != defaults.get(name))}  # fmt: skip
    file.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _has_lora_table(model: Any) -> bool:
    """Whether a token table has a LoRA: the rows of added tokens are then in its base layer."""
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    return any(hasattr(table, "lora_A") for table in tables)


def state_dict(adapter: Adapter) -> dict[str, Tensor]:
    """Return the tensors of an adapter by their PEFT names."""
    rank = int(adapter.settings.get("r") or adapter.rank)
    if adapter.experts:
        require("transformers", "5.0", "experts as 3-D parameters", where=adapter.origin)
        require("peft", "0.19", "the order of the factors of 3-D parameters", where=adapter.origin)
    tensors = {**adapter.extras, **expert_tensors(adapter.experts, adapter.arch, rank)}
    sites = join_sites(adapter.updates, adapter.arch)
    biased = any(update.bias is not None for update in sites.values())
    for (layer, site), update in sites.items():
        module = f"{PREFIX}{adapter.arch.module(layer, site)}"
        if adapter.kind == "adalora":
            tensors |= {f"{module}.{end}": value for end, value in split_update(update, adapter.config).items()}
            continue
        tensors[f"{module}.lora_A.weight"] = update.A
        tensors[f"{module}.lora_B.weight"] = update.B
        if biased:
            tensors[f"{module}.lora_B.bias"] = update.B.new_zeros(len(update.B)) if update.bias is None else update.bias
        if adapter.kind == "dora":
            rows = {part: adapter.magnitudes[layer, part] for part in site.parts}
            tensors[f"{module}.lora_magnitude_vector"] = join(rows, site, adapter.arch.in_layer(layer))
    if biased:  # PEFT then expects one of every LoRA, that of the head included
        tensors |= {f"{name.removesuffix('weight')}bias": tensor.new_zeros(len(tensor))
                    for name, tensor in adapter.extras.items() if name.endswith(".lora_B.weight")}  # fmt: skip
    if adapter.task.kind == "FEATURE_EXTRACTION":
        tensors = {f"{PREFIX}{_headless(name.removeprefix(PREFIX))}": tensor for name, tensor in tensors.items()}
    return separate_storage(tensors)


def _headless(path: str) -> str:
    """Return a module's path in a model without a head (`AutoModel`), which lacks the first component."""
    return path.partition(".")[2]


def peft_config(adapter: Adapter, *, base: str, revision: str | None = None) -> dict[str, Any]:
    """Return the PEFT config of an adapter: full module names, and ``lora_alpha = r``, except for AdaLoRA.

    It is a plain dictionary, because importing PEFT takes longer than an upgrade; PEFT adds its defaults when it reads.

    Args:
        adapter: The adapter.
        base: Folder or Hub id of the backbone.
        revision: Commit of the backbone on the Hub.
    """
    sites = join_sites(adapter.updates, adapter.arch)
    names = {adapter.arch.module(layer, site): update for (layer, site), update in sites.items()}
    settings = dict(adapter.settings)
    targets = [*names, *settings.pop("target_modules", [])]
    if adapter.task.kind == "FEATURE_EXTRACTION":
        names, targets = {_headless(path): update for path, update in names.items()}, list(map(_headless, targets))
    rank = int(settings.pop("r", 0) or adapter.rank)
    common = {
        "peft_type": "ADALORA" if adapter.kind == "adalora" else "LORA",
        "target_modules": sorted(targets),
        "fan_in_fan_out": any(site.conv1d for _, site in sites),
        "task_type": adapter.task.kind,
        "base_model_name_or_path": base,
        "revision": revision,
        **COMMON,
        **settings,
    }
    if adapter.experts:
        common["target_parameters"] = target_parameters(adapter.experts, adapter.arch)
    if adapter.kind == "adalora":
        return common | adalora_entries(names, adapter.config)
    biased = {"lora_bias": True} if any(update.bias is not None for update in sites.values()) else {}
    return common | {"r": rank, "lora_alpha": rank, "use_dora": adapter.kind == "dora"} | biased


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""Dtypes of written factors."""


def check_dtype(name: str) -> None:
    """Raise `LoraSuiteError` for a dtype that is not in `DTYPES`."""
    if name not in DTYPES:
        raise unknown_name_error("dtype", name, DTYPES)


def to_dtype(tensor: Tensor, name: str, *, where: str) -> Tensor:
    """Return a tensor in the dtype of the written file; raise `LoraSuiteError` if its values do not fit."""
    dtype = DTYPES[name]
    if dtype == tensor.dtype:
        return tensor
    largest = float(tensor.abs().max()) if tensor.numel() else 0.0
    if largest > torch.finfo(dtype).max:
        raise LoraSuiteError(
            f"the result's values do not fit {name}", where=where, got=f"{largest:.3g}",
            do="save it as bfloat16 or float32",
        )  # fmt: skip
    return tensor.to(dtype)


def write_adapter(
    adapter: Adapter, folder: Path, *, base: str, revision: str | None = None, dtype: str = "float32"
) -> None:
    """Write the PEFT config and weights of an adapter to an existing, empty folder; see `peft_config`."""
    from safetensors.torch import save_file

    check_dtype(dtype)
    config, tensors = peft_config(adapter, base=base, revision=revision), state_dict(adapter)
    for name, tensor in tensors.items():
        check_values(tensor, where=name, whose="result")
        tensors[name] = to_dtype(tensor, dtype, where=name)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
