"""Running a model whose decoder layers stay on disk: accelerate reads each layer when it runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ..arch.spec import Architecture
from ..errors import LoraSuiteError
from ..io.temporary import TemporaryFolder
from .loading import empty_model
from .logs import drop_messages

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


def disk_options(config: Any, arch: Architecture, location: str, access: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the loading options of transformers for a model whose layers and untied head stay on disk.

    They lack the folder for weights that must be renamed or converted first; see `offload_folder`. Weights that can be
    used as stored are read from the checkpoint.

    Args:
        config: The model's config.
        arch: Its architecture.
        location: Its folder or Hub id.
        access: Options of loading, where the code of its repository is trusted.
    """
    shell = empty_model(config, location, access)
    offloaded = arch.layer_path, *(() if arch.tied else (arch.head,))  # calibration does not run the head
    devices = {name: DISK if name.startswith(offloaded) else "cpu" for name in _modules(shell, arch.layer_path)}
    return {"device_map": devices}


def is_on_disk(model: Any) -> bool:
    """Return whether layers of a loaded model stay on disk."""
    return DISK in getattr(model, "hf_device_map", {}).values()


@contextmanager
def offload_folder() -> Iterator[tuple[str, Callable[[Any], Any]]]:
    """Create a temporary folder for the weights of one model that are converted before they are used from disk.

    Yields:
        The ``offload_folder`` of transformers, and a function to pass the loaded model through. If weights were written
        to the folder, it is deleted when the model is freed; otherwise when the context ends.
    """
    folder, in_use = TemporaryFolder(), False

    def keep(model: Any) -> Any:
        nonlocal in_use
        if any(folder.path.iterdir()):
            weakref.finalize(model, folder.close)
            in_use = True
        return model

    try:
        with drop_messages("accelerate.big_modeling"):  # it warns that layers are on disk, as was asked for
            yield str(folder.path), keep
    finally:
        if not in_use:
            folder.close()


def _modules(module: torch.nn.Module, layer_path: str, prefix: str = "") -> Iterator[str]:
    """Yield the paths of modules that together make up the model, the list of decoder layers among them."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if layer_path.startswith(f"{path}."):
            yield from _modules(child, layer_path, f"{path}.")
        else:
            yield path
