"""Running a model whose decoder layers stay on disk: accelerate reads each one when its turn comes."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator
from typing import Any

import torch

DISK = "disk"
"""The ``device_map`` that asks for it."""


def on_disk(config: Any, layer_path: str, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Return transformers' loading options for a model whose layers stay on disk; the rest is held.

    Safetensors that hold the weights as they are run are read in place; what has to be renamed or converted first is
    written to a scratch folder, which goes with the model (`tidy`).

    Args:
        config: The model's config.
        layer_path: Where its layers are, as in ``Architecture.layer_path``.
        trust_remote_code: As in transformers.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    places = {name: DISK if name.startswith(layer_path) else "cpu" for name in _around(shell, layer_path)}
    return {"device_map": places, "offload_folder": tempfile.mkdtemp(prefix="peft-lorasuite-")}


def tidy(model: torch.nn.Module, folder: str) -> None:
    """Remove the scratch folder when the model is gone."""
    weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)


def _around(module: torch.nn.Module, layer_path: str, prefix: str = "") -> Iterator[str]:
    """Yield the paths that together hold the model: the stack of layers, and what stands beside it on the way there."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if layer_path.startswith(f"{path}."):
            yield from _around(child, layer_path, f"{path}.")
        else:
            yield path
