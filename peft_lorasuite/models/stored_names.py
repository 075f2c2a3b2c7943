"""Names of tensors in a checkpoint, where they differ from those in the loaded model."""

from __future__ import annotations

from collections.abc import Iterator

from ..arch.spec import Architecture
from ..io.checkpoint import Checkpoint, ModelWeights


def find_stored(path: str, weights: Checkpoint | ModelWeights, arch: Architecture) -> str | None:
    """Return the stored name of a tensor whose name in the loaded model is ``path``; None if it is not stored."""
    return next((name for name in _spellings(path, arch) if name in weights), None)


def list_stored(module: str, weights: Checkpoint | ModelWeights, arch: Architecture) -> dict[str, str]:
    """Return the tensors of a module and its submodules: name in the loaded model -> stored name."""
    for prefix in _spellings(f"{module}.", arch):
        if names := [name for name in weights if name.startswith(prefix)]:
            return {f"{module}.{name.removeprefix(prefix)}": name for name in names}
    return {}


def _spellings(path: str, arch: Architecture) -> Iterator[str]:
    """Yield the names under which a tensor can be stored.

    Checkpoints of a model without head leave out the first component (``transformer.``), and some families store
    another name.
    """
    disk = [stored + path[len(memory) :] for memory, stored in arch.disk if path.startswith(memory + ".")]
    for one in (path, *disk):
        yield from filter(None, (one, one.partition(".")[2], f"base_model.model.{one}"))
