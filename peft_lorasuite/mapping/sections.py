"""Sections of an upgrade map: additional tensors of a single method, one file each, read tensor by tensor."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import LoraSuiteError
from ..io.checkpoint import broken_file_error, open_safetensors
from ..io.source import Source
from ..linalg.basis import Basis
from ..models.backbone import Backbone
from ..progress import Progress, no_progress
from .layer_pair import LayerPair

log = logging.getLogger(__name__)

REMOVED = {"transport": "the method that used it was removed"}
"""Sections of older versions -> why they are no longer read."""


@dataclass(frozen=True, eq=False)
class SectionRequest:
    """Arguments of the function that builds a section.

    Attributes:
        layers: The matched layers of the map.
        basis: ``basis(pair, part)``, see `UpgradeMap.basis`.
        old: The old backbone.
        new: The new backbone.
        parts: Parts to build for; both backbones have them.
        options: The method's options.
        seed: Random seed.
        progress: Shows the progress of a long step.
    """

    layers: Sequence[LayerPair]
    basis: Callable[[LayerPair, str], Basis]
    old: Backbone
    new: Backbone
    parts: Sequence[str]
    options: Any
    seed: int = 0
    progress: Progress = no_progress


@dataclass(frozen=True)
class SectionSpec:
    """Declaration of a method's section.

    Attributes:
        name: Name of the section and, with ``.safetensors``, of its file.
        build: Builds the tensors.
        settings: Names of the method's options that the tensors depend on; their values are stored with the section.
        covers: ``(stored settings, options)`` -> whether a section built with these settings can be used with these
            options.
    """

    name: str
    build: Callable[[SectionRequest], Mapping[str, Tensor]]
    settings: tuple[str, ...]
    covers: Callable[[Mapping[str, Any], Any], bool]


@dataclass(frozen=True, eq=False)
class Section:
    """A section in memory, or in a file that is downloaded and opened when the first tensor is read.

    Attributes:
        name: Name of the section.
        parts: The parts that it has tensors for.
        settings: Option -> value that it was built with.
        key: Fingerprint of the map that it belongs to.
        bytes: Size of its file or, in memory, of its tensors.
        tensors: The tensors, if it is in memory.
        source: Where its file is, if it is not in memory.
    """

    name: str
    parts: tuple[str, ...]
    settings: Mapping[str, Any]
    key: str
    bytes: int
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    source: Source | None = None
    _handles: list[Any] = field(default_factory=list, repr=False)

    @property
    def file(self) -> str:
        """Name of the file in the map's folder."""
        return f"{self.name}.safetensors"

    @property
    def where(self) -> str:
        """The file or the section's name, for messages."""
        return f"{self.source.name}/{self.file}" if self.source else f"section {self.name}"

    def check(self) -> None:
        """Check the file before any tensor is read.

        Raises:
            LoraSuiteError: When it is damaged or belongs to another map.
        """
        if self.source is not None:
            self._open()

    def read(self, name: str, shape: Sequence[int | None]) -> Tensor:
        """Read one tensor in float32; None in ``shape`` stands for any length.

        Raises:
            LoraSuiteError: When the tensor is missing, has another shape, or is not finite.
        """
        if self.source is None:
            tensor = self.tensors.get(name)
        else:
            handle = self._open()
            try:
                tensor = handle.get_tensor(name) if name in handle.keys() else None  # noqa: SIM118 (not a dict)
            except SafetensorError as error:
                raise broken_file_error(self.where, error) from error
        if tensor is None:
            raise LoraSuiteError("the section lacks a tensor", where=self.where, wanted=name, do="build it again")
        fits = len(tensor.shape) == len(shape) and all(
            wanted in (None, size) for size, wanted in zip(tensor.shape, shape, strict=True)
        )
        if not fits:
            wanted = tuple("any" if size is None else size for size in shape)
            raise LoraSuiteError(
                f"a tensor of the section has the wrong shape: {name}", where=self.where, got=tuple(tensor.shape),
                wanted=wanted, do="build it again",
            )  # fmt: skip
        if not torch.isfinite(tensor).all():
            raise LoraSuiteError("values are not finite", where=self.where, got=name, do="build it again")
        return tensor.float()

    def write(self, folder: Path, *, kept: Path | None = None) -> dict[str, Any]:
        """Write the file, or link or copy the file that the section is read from.

        Args:
            folder: Folder to write to.
            kept: Folder that ``folder`` replaces; a file in it is linked rather than copied.

        Returns:
            The record of the section in ``map.json``.
        """
        from safetensors.torch import save_file

        target = folder / self.file
        if self.source is None:
            whole = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
            save_file(whole, target, metadata={"map": self.key})
        else:
            self._open()
            path = self.source.require(self.file)
            if kept is None or path.parent.resolve() != kept.resolve() or not _link(path, target):
                shutil.copyfile(path, target)
        return {**self.describe(), "bytes": target.stat().st_size}

    def describe(self) -> dict[str, Any]:
        """Return everything but the tensors, as JSON values."""
        return {
            "file": self.file,
            "bytes": self.bytes,
            "parts": list(self.parts),
            "settings": dict(self.settings),
            "map": self.key,
        }

    def _open(self) -> Any:
        if not self._handles:
            if self.source is None:
                raise LoraSuiteError("the section is in memory and has no file", where=self.where)
            path = self.source.require(self.file, do=f"build the map with the method that needs it: {self.name}")
            if path.stat().st_size != self.bytes:
                raise LoraSuiteError(
                    "the file size differs from the one in map.json", where=self.where, got=path.stat().st_size,
                    wanted=f"{self.bytes} bytes", do="fetch or build it again",
                )  # fmt: skip
            handle = open_safetensors(path, where=self.where)
            if (handle.metadata() or {}).get("map") != self.key:
                raise LoraSuiteError("the file belongs to another map", where=self.where, do="fetch or build it again")
            self._handles.append(handle)
        return self._handles[0]


def _link(path: Path, target: Path) -> bool:
    try:
        os.link(path, target)
    except OSError:  # the file system has no links
        return False
    return True


def build_section(spec: SectionSpec, request: SectionRequest, key: str) -> Section:
    """Build a section in memory; ``key`` is the fingerprint of its map."""
    tensors = dict(spec.build(request))
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    settings = {name: getattr(request.options, name) for name in spec.settings}
    return Section(spec.name, tuple(request.parts), settings, key, size, tensors)


def list_sections(meta: Mapping[str, Any], source: Source, key: str) -> dict[str, Section]:
    """Return the sections listed in ``map.json``, without downloading or opening their files."""
    found = {}
    for name, record in meta.get("sections", {}).items():
        if name in REMOVED:
            log.warning("%s: the section %r is ignored: %s", source.name, name, REMOVED[name])
            continue
        if record["map"] != key or record["file"] != f"{name}.safetensors":
            raise LoraSuiteError(
                "a section belongs to another map", where=f"{source.name}, {name}", do="build it again"
            )
        found[name] = Section(
            name, tuple(record["parts"]), dict(record["settings"]), key, record["bytes"], source=source
        )
    return found
