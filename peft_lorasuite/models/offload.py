"""Running a model whose decoder layers stay on disk: accelerate reads each layer when it runs."""

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
"""The ``device_map`` of such a model."""


def resolve_device_map(device_map: Any, low_memory: bool) -> Any:
    """Return `DISK` for ``low_memory``, else the given ``device_map``.

    Raises:
        LoraSuiteError: When both are given.
    """
    if low_memory and device_map not in (None, DISK):
        raise LoraSuiteError("low_memory and device_map cannot be combined", got=device_map, do="pass one of them")
    return DISK if low_memory else device_map


def disk_options(config: Any, arch: Architecture, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Return the loading options of transformers for a model whose layers and untied head stay on disk.

    Weights that can be used as stored are read from the checkpoint. Those that must be renamed or converted first are
    written to a temporary folder, which `clean_offload_folder` deletes.

    Args:
        config: The model's config.
        arch: Its architecture.
        trust_remote_code: As in transformers.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    offloaded = arch.layer_path, *(() if arch.tied else (arch.head,))  # calibration does not run the head
    devices = {name: DISK if name.startswith(offloaded) else "cpu" for name in _modules(shell, arch.layer_path)}
    return {"device_map": devices, "offload_folder": tempfile.mkdtemp(prefix="peft-lorasuite-")}


def is_on_disk(model: Any) -> bool:
    """Return whether layers of a loaded model stay on disk."""
    return DISK in getattr(model, "hf_device_map", {}).values()


@contextmanager
def clean_offload_folder(options: Mapping[str, Any]) -> Iterator[Callable[[Any], Any]]:
    """Delete the ``offload_folder`` of some loading options, or bind its lifetime to the model that uses it.

    Yields:
        A function to pass the loaded model through. If its weights were written to the folder, the folder is deleted
        when the model is freed; otherwise it is deleted when the context ends.
    """
    folder = options.get("offload_folder")
    in_use = False
    logger = logging.getLogger("accelerate.big_modeling")  # warns that layers are on disk, as was asked for
    level = logger.level
    logger.setLevel(logging.ERROR if folder is not None else level)

    def keep(model: Any) -> Any:
        nonlocal in_use
        if folder is not None and any(Path(folder).iterdir()):
            weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
            in_use = True
        return model

    try:
        yield keep
    finally:
        logger.setLevel(level)
        if folder is not None and not in_use:
            shutil.rmtree(folder, ignore_errors=True)


def _modules(module: torch.nn.Module, layer_path: str, prefix: str = "") -> Iterator[str]:
    """Yield the paths of modules that together make up the model, the list of decoder layers among them."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if layer_path.startswith(f"{path}."):
            yield from _modules(child, layer_path, f"{path}.")
        else:
            yield path
