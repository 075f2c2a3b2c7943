"""Tokens that were added to the old backbone for an adapter, and their rows in the tables saved with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..arch.spec import Architecture
from ..errors import LoraSuiteError
from ..io.source import Source
from ..models.backbone import Backbone
from ..models.extended import ExtendedBackbone, TableRows
from .key_names import parse_names
from .token_tables import DELTA, find_table, trained_tokens
from .tokenizer import added_tokens, read_tokenizer

COPIES = ("base_layer.weight", "token_adapter.base_layer.weight", "original_module.weight")
"""Endings of copies of a resized table that PEFT saves with the update of the table."""


@dataclass(frozen=True, eq=False)
class AddedTokens:
    """Tokens that were added to the old backbone for an adapter.

    Attributes:
        backbone: The old backbone with their rows, and the tokenizer with the tokens.
        saved: Token -> id, of the tokens whose rows were saved with the adapter.
        lost: Token -> why it has no row.
    """

    backbone: ExtendedBackbone
    saved: Mapping[str, int]
    lost: Mapping[str, str] = field(default_factory=dict)


@dataclass
class _Table:
    """What was saved of one token table: all of its rows, or those of some tokens."""

    rows: Tensor | None = None
    tokens: dict[int, Tensor] = field(default_factory=dict)
    size: int | None = None

    def known(self, numbers: list[int]) -> list[int]:
        return [n for n in numbers if n in self.tokens or (self.rows is not None and n < len(self.rows))]

    def row(self, number: int) -> Tensor:
        return self.tokens[number] if number in self.tokens or self.rows is None else self.rows[number]


def read_added_tokens(
    source: Source, tensors: Mapping[str, Tensor], config: Mapping[str, Any], old: Backbone
) -> AddedTokens | None:
    """Return the tokens that were added for an adapter; None if there are none and no table was resized.

    Tokens are those of the tokenizer in the adapter's folder. Rows without a token, as in tables that were padded to a
    multiple of 64, are no tokens.

    Args:
        source: Folder or repository of the adapter.
        tensors: Saved name -> tensor.
        config: The adapter's PEFT config.
        old: The old backbone.

    Raises:
        LoraSuiteError: If the tokenizer cannot be loaded, or the tables differ in size.
    """
    tables = _read_tables(tensors, config, old.arch)
    tokenizer = read_tokenizer(source)
    added = {} if tokenizer is None else added_tokens(tokenizer, old.tokenizer)
    size = _table_size(tables, old.arch.vocabulary, len(added), source.name)
    if not added and size == old.arch.vocabulary:
        return None
    numbers = sorted({*added.values(), *range(old.arch.vocabulary, size)})
    numbers = [number for number in numbers if number < size]
    values = {}
    for name, table in tables.items():
        known = table.known(numbers)
        if known and not (name == "head" and old.arch.tied):
            values[name] = torch.tensor(known), torch.stack([table.row(number) for number in known]).float()
    carried = set(values["embedding"][0].tolist()) if "embedding" in values else set()
    saved = {token: number for token, number in added.items() if number in carried}
    lost = {token: "its row was not saved with the adapter" for token in added if token not in saved}
    lost |= {token: "it has no row in the embedding" for token, number in added.items() if number >= size}
    if not added and size > old.arch.vocabulary:
        rows = f"rows {old.arch.vocabulary} to {size - 1}"
        lost[rows] = "the adapter's folder has no tokenizer that names their tokens"
    backbone = ExtendedBackbone(old, tokenizer if added else old.tokenizer, TableRows(size, values))
    return AddedTokens(backbone, saved, lost)


def _read_tables(tensors: Mapping[str, Tensor], config: Mapping[str, Any], arch: Architecture) -> dict[str, _Table]:
    """Return what was saved of each token table: its trained rows or, where it was not trained, the copy of it."""
    endings: dict[str, dict[str, Tensor]] = {}
    for name, key in parse_names(tensors, arch).items():
        table = find_table(key.module, arch)
        if table is not None:
            endings.setdefault(table, {})[key.ending] = tensors[name]
    return {table: _read_table(table, found, config, arch) for table, found in endings.items()}


def _read_table(table: str, found: Mapping[str, Tensor], config: Mapping[str, Any], arch: Architecture) -> _Table:
    matrices = {end: tensor for end, tensor in found.items() if tensor.ndim == 2 and tensor.numel()}
    whole = [matrices[end] for end in ("weight", *COPIES) if end in matrices]
    whole = [rows for rows in whole if rows.shape[1] == arch.hidden]  # others are refused when the update is read
    tokens: dict[int, Tensor] = {}
    if DELTA in matrices:
        numbers = trained_tokens(config.get("trainable_token_indices"), table, arch)
        tokens = dict(zip(numbers, matrices[DELTA], strict=False))
    sizes = [len(rows) for rows in whole]
    sizes += [
        matrices[end].shape[side] for end, side in (("lora_embedding_A", 1), ("lora_B.weight", 0)) if end in matrices
    ]
    return _Table(whole[0] if whole else None, tokens, sizes[0] if sizes else None)


def _table_size(tables: Mapping[str, _Table], own: int, added: int, where: str) -> int:
    """Return the number of rows of both tables; ``own`` is that of the backbone."""
    sizes = {name: table.size for name, table in tables.items() if table.size}
    if len(set(sizes.values())) > 1:
        raise LoraSuiteError(
            "the saved tables of embedding and head differ in size", where=where, got=sizes, do="fetch it again"
        )
    if sizes:
        return next(iter(sizes.values()))
    trained = [number for table in tables.values() for number in table.tokens if type(number) is int]
    return max([own, *(number + 1 for number in trained if number < own + added)])
