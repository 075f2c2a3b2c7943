"""Tensors of a safetensors checkpoint, sharded or not, read one at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CONTROL, LoraSuiteError
from .file_kinds import INDEX
from .json_file import read_json
from .source import Source

SINGLE = "model.safetensors"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
"""Names of the floating-point dtypes in safetensors files that are read; smaller ones need scales stored elsewhere."""
INTEGERS = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")
NAME_LENGTH = 256
"""Most characters of a tensor's name in an adapter or a map; the longest known have about 150."""
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin", "consolidated.00.pth")


class Checkpoint:
    """The weight files of a source; a shard is downloaded and opened when one of its tensors is needed."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._open: dict[str, Any] = {}

    @cached_property
    def shards(self) -> dict[str, str]:
        """Tensor name -> file that contains it."""
        index = self.source.fetch(INDEX)
        if index is not None:
            return read_json(index, where=f"{self.source.name}/{INDEX}")["weight_map"]
        if self.source.fetch(SINGLE) is None:
            raise no_safetensors_error(self.source, SINGLE)
        return dict.fromkeys(self._file(SINGLE).keys(), SINGLE)

    def __contains__(self, name: str) -> bool:
        return name in self.shards

    def __iter__(self) -> Iterator[str]:
        return iter(self.shards)

    def __getitem__(self, name: str) -> Tensor:
        return self._read(name, "get_tensor")

    @property
    def num_bytes(self) -> int:
        """Size of all weight files."""
        return sum(self.source.require(shard).stat().st_size for shard in set(self.shards.values()))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the largest tensor in the first file, in which most weights are stored."""
        file = self._file(next(iter(self.shards.values())))
        slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118 (a safetensors handle, not a dict)
        largest = max(slices, key=lambda one: math.prod(one.get_shape()))
        return DTYPES.get(largest.get_dtype(), torch.float32)

    def fetch(self) -> None:
        """Download every shard and verify its hash, which transformers does not do."""
        shards = sorted(set(self.shards.values()))
        self.source.announce(shards)
        for shard in shards:
            self.source.require(shard)

    def rows(self, name: str, numbers: list[int]) -> Tensor:
        """Read the rows ``numbers`` of a matrix, and no others, from disk."""
        piece = self._read(name, "get_slice")
        _check_rows(piece.get_shape(), numbers, f"{self.source!r}, {name}")
        return torch.stack([piece[number] for number in numbers])

    def sample_rows(self, name: str, count: int) -> Tensor:
        """Read ``count`` evenly spaced rows of a matrix, or a whole vector."""
        shape = self._read(name, "get_slice").get_shape()
        rows = _check_rows(shape, [], f"{self.source!r}, {name}")
        return self[name] if len(shape) == 1 else self.rows(name, evenly_spaced(rows, count))

    def _read(self, name: str, how: str) -> Any:
        """Read a tensor, or open it with ``get_slice``; raise `LoraSuiteError` if its file does not have it."""
        shard = self.shards[name]
        try:
            return getattr(self._file(shard), how)(name)
        except SafetensorError as error:
            raise broken_file_error(f"{self.source.name}/{shard}", error) from error

    def _file(self, shard: str) -> Any:
        if shard not in self._open:
            self._open[shard] = open_safetensors(self.source.require(shard), where=f"{self.source.name}/{shard}")
        return self._open[shard]


class ModelWeights:
    """The weights of a model in memory, with the interface of `Checkpoint`."""

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
                do="load the model without offloading, or pass its folder or Hub id",
            )  # fmt: skip
        return tensor.cpu()

    def rows(self, name: str, numbers: list[int]) -> Tensor:
        """Return the rows ``numbers`` of a matrix."""
        _check_rows(self._tensors[name].shape, numbers, name)
        return self._tensors[name].detach()[numbers].cpu()  # only these rows are copied from the GPU

    def sample_rows(self, name: str, count: int) -> Tensor:
        """Return ``count`` evenly spaced rows of a matrix, or a whole vector."""
        tensor = self._tensors[name].detach()
        return tensor.cpu() if tensor.ndim < 2 else self.rows(name, evenly_spaced(len(tensor), count))


def evenly_spaced(length: int, count: int) -> list[int]:
    """Return ``count`` evenly spaced row numbers, including the first and the last."""
    return torch.linspace(0, length - 1, count).long().tolist()


def _check_rows(shape: Sequence[int], numbers: list[int], where: str) -> int:
    """Return the number of rows; raise `LoraSuiteError` if there are none, or fewer than needed."""
    rows, needed = (shape[0] if shape else 0), max(numbers, default=0) + 1
    if rows < needed:
        raise LoraSuiteError(
            "a weight does not fit the config", where=where, got=f"{rows} rows", wanted=f"at least {needed}",
            do="fetch the backbone again",
        )  # fmt: skip
    return rows


def open_safetensors(path: Path, *, where: str) -> Any:
    """Open a safetensors file for lazy reading."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        if not os.access(path, os.R_OK):  # safetensors reports it as not found
            raise LoraSuiteError("permission denied", where=where, do="check the file permissions") from error
        raise broken_file_error(where, error) from error


def read_tensors(path: Path, *, where: str) -> dict[str, Tensor]:
    """Read every tensor of a safetensors file.

    Raises:
        LoraSuiteError: If the file is damaged, a name or a dtype is not one of an adapter or a map, or a value is not
            finite.
    """
    file = open_safetensors(path, where=where)
    _check_header(file, where)
    try:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a safetensors handle, not a dict)
    except SafetensorError as error:
        raise broken_file_error(where, error) from error
    numbers = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    bad = sorted(name for name, tensor in numbers.items() if not torch.isfinite(tensor).all())
    if bad:
        raise LoraSuiteError("values are not finite", where=where, got=", ".join(bad[:3]), do="train or fetch it again")
    return tensors


def _check_header(file: Any, where: str) -> None:
    for name in file.keys():  # noqa: SIM118 (a safetensors handle, not a dict)
        if len(name) > NAME_LENGTH or CONTROL.search(name):
            raise LoraSuiteError(
                "malformed name of a tensor", where=where, got=repr(name[:80]),
                wanted=f"at most {NAME_LENGTH} characters, none of them a control character", do="fetch it again",
            )  # fmt: skip
        dtype = file.get_slice(name).get_dtype()
        if dtype not in DTYPES and dtype not in INTEGERS:
            raise LoraSuiteError(
                f"tensors of dtype {dtype} are not read", where=f"{where}, {name}",
                wanted=" or ".join(str(one).removeprefix("torch.") for one in DTYPES.values()),
                do="save the weights again in one of these dtypes",
            )  # fmt: skip


def broken_file_error(where: str, error: Exception) -> LoraSuiteError:
    """Build the error for a file that safetensors cannot read."""
    return LoraSuiteError(f"malformed safetensors file ({error})", where=where, do="fetch it again")


def no_safetensors_error(source: Source, wanted: str) -> LoraSuiteError:
    """Build the error for a source without safetensors weights; it names the pickle file if there is one."""
    pickle = next((name for name in PICKLES if source.has(name)), None)
    if pickle:
        return LoraSuiteError(
            "the weights are a pickle file, which can run code when it is loaded, and are not read",
            where=f"{source.name}/{pickle}",
            wanted=wanted,
            do="if you trust them, convert them to safetensors with save_pretrained",
        )
    return LoraSuiteError(f"the {source.kind} has no weights", where=source.name, wanted=wanted, do="check the name")
