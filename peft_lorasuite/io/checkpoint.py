"""Tensors of a (sharded) safetensors checkpoint, read one at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import LoraSuiteError
from .source import Source, read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
"""Names of floating point dtypes in a safetensors file."""
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin", "consolidated.00.pth")


class Checkpoint:
    """The weight files of a source; shards are opened, and on the Hub fetched, when a tensor of theirs is wanted."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._open: dict[str, Any] = {}

    @cached_property
    def shards(self) -> dict[str, str]:
        """Tensor name -> file that holds it."""
        index = self.source.fetch(INDEX)
        if index is not None:
            table = read_json(index, where=f"{self.source.name}/{INDEX}").get("weight_map")
            if not isinstance(table, dict) or not all(isinstance(file, str) for file in table.values()):
                raise LoraSuiteError("the index has no weight map", where=f"{self.source.name}/{INDEX}")
            return table
        if self.source.fetch(SINGLE) is None:
            raise no_safetensors_error(self.source, SINGLE)
        return dict.fromkeys(self._file(SINGLE).keys(), SINGLE)

    def __contains__(self, name: str) -> bool:
        return name in self.shards

    def __iter__(self) -> Iterator[str]:
        return iter(self.shards)

    def __getitem__(self, name: str) -> Tensor:
        shard = self.shards[name]
        try:
            return self._file(shard).get_tensor(name)
        except SafetensorError as error:
            raise broken_file_error(f"{self.source.name}/{shard}", error) from error

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(self.source.require(shard).stat().st_size for shard in set(self.shards.values()))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the largest tensor of the first file: what most weights are stored in."""
        file = self._file(next(iter(self.shards.values())))
        slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118 (a safetensors handle)
        largest = max(slices, key=lambda piece: math.prod(piece.get_shape()))
        return DTYPES.get(largest.get_dtype(), torch.float32)

    def fetch(self) -> None:
        """Bring every shard into the Hub's cache, checked: transformers itself takes what it is given."""
        shards = sorted(set(self.shards.values()))
        self.source.announce(shards)
        for shard in shards:
            self.source.require(shard)

    def rows(self, name: str, numbers: list[int]) -> Tensor:
        """Read some rows of a matrix without reading the rest."""
        piece = self._file(self.shards[name]).get_slice(name)
        _check_rows(piece.get_shape()[0], numbers, f"{self.source!r}, {name}")
        return torch.stack([piece[number] for number in numbers])

    def sample_rows(self, name: str, count: int) -> Tensor:
        """Read some rows, spread evenly over a matrix."""
        return self.rows(name, evenly_spaced(self._file(self.shards[name]).get_slice(name).get_shape()[0], count))

    def _file(self, shard: str) -> Any:
        if shard not in self._open:
            self._open[shard] = open_safetensors(self.source.require(shard), where=f"{self.source.name}/{shard}")
        return self._open[shard]


class ModelWeights:
    """The weights of a model that is in memory already."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._tensors = model.state_dict()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name].detach()
        if tensor.is_meta:
            raise LoraSuiteError(
                "the model's weights are not in memory", where=name, got="a tensor on the meta device",
                do="load it without offloading, or name its folder or Hub id",
            )  # fmt: skip
        return tensor.cpu()

    def rows(self, name: str, numbers: list[int]) -> Tensor:
        """Take some rows of a matrix."""
        _check_rows(len(self._tensors[name]), numbers, name)
        return self._tensors[name].detach()[numbers].cpu()  # a few rows leave the GPU, not the matrix

    def sample_rows(self, name: str, count: int) -> Tensor:
        """Take some rows, spread evenly over a matrix."""
        return self.rows(name, evenly_spaced(len(self._tensors[name]), count))


def evenly_spaced(length: int, count: int) -> list[int]:
    """Return row numbers from the first to the last."""
    return torch.linspace(0, length - 1, count).long().tolist()


def _check_rows(rows: int, numbers: list[int], where: str) -> None:
    if max(numbers) >= rows:
        raise LoraSuiteError(
            "a token table does not fit the config", where=where, got=f"{rows} rows",
            wanted=f"at least {max(numbers) + 1}", do="fetch the backbone again",
        )  # fmt: skip


def open_safetensors(path: Path, *, where: str) -> Any:
    """Open a safetensors file for lazy reading."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        if not os.access(path, os.R_OK):  # safetensors says that there is no such file
            raise LoraSuiteError("there is no right to read the file", where=where, do="check its rights") from error
        raise broken_file_error(where, error) from error


def read_tensors(path: Path, *, where: str) -> dict[str, Tensor]:
    """Read every tensor of a safetensors file, refusing values that are not finite."""
    file = open_safetensors(path, where=where)
    try:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a safetensors handle, no dict)
    except SafetensorError as error:
        raise broken_file_error(where, error) from error
    bad = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
    if bad:
        raise LoraSuiteError("values are not finite", where=where, got=", ".join(bad[:3]), do="train or fetch it again")
    return tensors


def broken_file_error(where: str, error: Exception) -> LoraSuiteError:
    """Build the error for a file that safetensors cannot read."""
    return LoraSuiteError(f"the file is no whole safetensors file ({error})", where=where, do="fetch it again")


def no_safetensors_error(source: Source, wanted: str) -> LoraSuiteError:
    """Build the error for a place without safetensors, naming a pickle if that is what it has."""
    pickle = next((name for name in PICKLES if source.has(name)), None)
    if pickle:
        return LoraSuiteError(
            "the weights are a pickle, which can run code when read, and are not opened",
            where=f"{source.name}/{pickle}",
            wanted=wanted,
            do="convert them to safetensors where you trust them (save_pretrained does)",
        )
    return LoraSuiteError(f"the {source.kind} has no weights", where=source.name, wanted=wanted, do="check the name")
