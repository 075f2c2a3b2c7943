"""The files of an adapter that this package made: PEFT's own two, its report and the record of its training."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from .peft_format import WEIGHTS

REPORT = "lorasuite_report.json"
"""Beside the weights: what was carried over, and how."""
RECORD = "lorasuite_finetune.json"
"""Beside the weights: how they were trained."""


def write_adapter(model: Any, folder: Path, weights: Any = None) -> None:
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
