"""A backbone with other rows in its token tables than its checkpoint: tokens were added, or the tables resized."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .backbone import Backbone


@dataclass(frozen=True, eq=False)
class TableRows:
    """Size of the token tables, and rows that differ from the checkpoint.

    Attributes:
        size: Rows of both tables.
        values: ``embedding`` or ``head`` -> token ids, (tokens,), and their rows, (tokens, D). A tied head has none.
    """

    size: int
    values: Mapping[str, tuple[Tensor, Tensor]]

    def extend(self, table: str, weight: Tensor) -> Tensor:
        """Return a copy of a table's weight with these rows; further rows are the mean of the weight's own."""
        missing = self.size - len(weight)
        own = weight[: self.size].clone()
        if missing > 0:
            own = torch.cat([own, weight.float().mean(dim=0).to(weight).expand(missing, -1)])
        if table in self.values:
            ids, rows = self.values[table]
            own[ids.to(own.device)] = rows.to(own)
        return own


class ExtendedBackbone(Backbone):
    """A backbone with other rows in its token tables than its checkpoint.

    Args:
        base: The backbone.
        tokenizer: The tokenizer with the added tokens.
        rows: Size of the token tables, and the rows that differ.
    """

    def __init__(self, base: Backbone, tokenizer: Any, rows: TableRows) -> None:
        super().__init__(
            base.source, model=base._model, trust_remote_code=base.trust_remote_code, dtype=base.dtype,
            device_map=base.device_map,
        )  # fmt: skip
        self.base, self.rows, self.tokenizer = base, rows, tokenizer
        self.config, self.weights = base.config, base.weights
        self.arch = replace(base.arch, vocabulary=rows.size)

    def tensor(self, path: str, dtype: torch.dtype | None = torch.float32) -> Tensor:
        """Read one tensor; a token table with its new rows."""
        tensor = super().tensor(path, dtype)
        if path == f"{self.arch.head}.bias":
            return torch.cat([tensor, tensor.new_zeros(max(self.rows.size - len(tensor), 0))])[: self.rows.size]
        table = self._table_name(path.removesuffix(".weight"))
        return tensor if table is None else self.rows.extend(table, tensor)

    def _table(self, name: str) -> Tensor:
        return self.rows.extend(self._table_name(name) or "", self.base._table(name))

    def _table_name(self, path: str) -> str | None:
        return {self.arch.embedding: "embedding", self.arch.head: "head"}.get(path)

    @contextmanager
    def running(self, **settings: Any) -> Iterator[Any]:
        """Load the model with resized token tables; a model in memory is restored when the context ends."""
        with super().running(**settings) as model, restore_tables(model) if self.in_memory else nullcontext():
            if self.in_memory:
                resize_tables(model, self.rows)
            yield model

    def _load_weights(self, *args: Any, **settings: Any) -> Any:
        model = super()._load_weights(*args, **settings)
        resize_tables(model, self.rows)
        return model


def resize_tables(model: Any, rows: TableRows) -> None:
    """Resize the token tables of a loaded model, with transformers, and set the rows that differ."""
    weights = {name: module.weight.data for name, module in _tables(model).items()}
    with torch.random.fork_rng():  # transformers draws the new rows at random
        model.resize_token_embeddings(rows.size, mean_resizing=False)
    tables = _tables(model)
    tied = "head" in tables and tables["head"].weight is tables["embedding"].weight
    for name, module in tables.items():
        if not (name == "head" and tied):
            module.weight.data = rows.extend(name, weights[name])


@contextmanager
def restore_tables(model: Any) -> Iterator[None]:
    """Restore the token tables of a model, and its vocabulary size, when the context ends."""
    counts = ("num_embeddings", "out_features", "padding_idx")
    tables = [
        (
            module,
            module.weight,
            module.weight.data,
            {name: getattr(module, name) for name in counts if name in vars(module)},
        )
        for module in _tables(model).values()
    ]
    size, own = model.config.get_text_config().vocab_size, vars(model).get("vocab_size")
    try:
        yield
    finally:
        for module, weight, values, numbers in tables:
            weight.data, module.weight = values, weight
            vars(module).update(numbers)
        model.set_input_embeddings(tables[0][0])
        if tables[1:]:
            model.set_output_embeddings(tables[1][0])
        model.config.get_text_config().vocab_size = size
        if own is None:
            vars(model).pop("vocab_size", None)
        else:
            model.vocab_size = own


def _tables(model: Any) -> dict[str, Any]:
    """Return the modules of the embedding and of the head, if the model has one."""
    modules = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    return {name: module for name, module in modules.items() if module is not None}
