"""Running a model whose decoder layers stay on disk: accelerate reads each one when its turn comes."""

from __future__ import annotations

import logging
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..arch.spec import Architecture
from ..errors import LoraSuiteError

DISK = "disk"
"""The ``device_map`` that asks for it."""


def resolve_device_map(device_map: Any, low_memory: bool) -> Any:
    """Return the ``device_map`` that ``low_memory`` stands for."""
    if low_memory and device_map not in (None, DISK):
        raise LoraSuiteError(
            "low memory says where the layers are, and so does the device map",
            got=device_map,
            do="leave one of them out",
        )
    return DISK if low_memory else device_map


def disk_options(config: Any, arch: Architecture, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Return transformers' loading options for a model whose layers (and head of its own) stay on disk.

    Safetensors that hold the weights as they are run are read in place; what has to be renamed or converted first is
    written to a scratch folder, which goes with the model (`clean_offload_folder`).

    Args:
        config: The model's config.
        arch: Its layout.
        trust_remote_code: As in transformers.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    away = arch.layer_path, *(() if arch.tied else (arch.head,))  # calibration does not run the head
    places = {name: DISK if name.startswith(away) else "cpu" for name in _around(shell, arch.layer_path)}
    return {"device_map": places, "offload_folder": tempfile.mkdtemp(prefix="peft-lorasuite-")}


def is_on_disk(model: Any) -> bool:
    """Whether a loaded model's layers come and go."""
    return DISK in getattr(model, "hf_device_map", {}).values()


@contextmanager
def clean_offload_folder(options: Mapping[str, Any]) -> Iterator[Callable[[Any], Any]]:
    """Remove the scratch folder of some loading options, if they name one and nothing needs it.

    Yields:
        What the loaded model is to be passed through: if something was written for it, the folder goes when it does.
    """
    folder = options.get("offload_folder")
    held = False
    info = logging.getLogger("accelerate.big_modeling")  # that layers are on disk is what was asked for
    level = info.level
    info.setLevel(logging.ERROR if folder is not None else level)

    def keep(model: Any) -> Any:
        nonlocal held
        if folder is not None and any(Path(folder).iterdir()):
            weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
            held = True
        return model

    try:
        yield keep
    finally:
        info.setLevel(level)
        if folder is not None and not held:
            shutil.rmtree(folder, ignore_errors=True)


def _around(module: torch.nn.Module, layer_path: str, prefix: str = "") -> Iterator[str]:
    """Yield the paths that together hold the model: the stack of layers, and what stands beside it on the way there."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if layer_path.startswith(f"{path}."):
            yield from _around(child, layer_path, f"{path}.")
        else:
            yield path
