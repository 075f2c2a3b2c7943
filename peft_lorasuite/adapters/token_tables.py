"""Updates of the token tables, that is, the embedding and the language-model head, in all forms that PEFT saves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..arch.spec import Architecture
from ..errors import LoraSuiteError
from ..linalg.lowrank import LowRank, check_values
from ..models.backbone import Backbone

EMBEDDING, LINEAR = ("lora_embedding_A", "lora_embedding_B"), ("lora_A.weight", "lora_B.weight")
DELTA = "token_adapter.trainable_tokens_delta"
"""Endings of tensor names: LoRA of an embedding or a linear head, and new values of single tokens."""


@dataclass(frozen=True, eq=False)
class TableUpdate:
    """The change ``rows @ shared`` of some rows of a token table.

    Attributes:
        form: ``lora``, ``full`` (``modules_to_save``) or ``tokens`` (``trainable_token_indices``); the result is saved
            in the same form.
        ids: Token ids of the rows, ``(tokens,)``.
        rows: ``(tokens, rank)``.
        shared: ``(rank, hidden)``.
        names: Names of the tensors that it was read from.
    """

    form: str
    ids: Tensor
    rows: Float[Tensor, "tokens rank"]
    shared: Float[Tensor, "rank hidden"]
    names: tuple[str, ...]


def find_table(module: str, arch: Architecture) -> str | None:
    """Return ``embedding`` or ``head`` if a module is one of them, by its path in memory or on disk; else None."""
    paths = {"embedding": [arch.embedding], "head": [arch.head]}
    for table, known in paths.items():
        known += [disk for memory, disk in arch.disk if memory == known[0]]
        if any(module == path or path.endswith(f".{module}") or module.endswith(f".{path}") for path in known):
            return table
    return None


def read_table(
    table: str, used: Mapping[str, Tensor], names: tuple[str, ...], config: Mapping[str, Any],
    scaling: Callable[[int], float], arch: Architecture, old: Backbone | None, *, where: str,
) -> TableUpdate:  # fmt: skip
    """Read the update of a token table in any of its forms.

    Args:
        table: ``embedding`` or ``head``.
        used: Ending -> tensor of the table's module.
        names: Names of these tensors.
        config: The adapter's PEFT config.
        scaling: Rank -> scaling.
        arch: Architecture of the backbone.
        old: The backbone, to subtract its weights from new values.
        where: Place for error messages.

    Raises:
        LoraSuiteError: If a tensor is missing or malformed, or the backbone is needed and not given.
    """
    module = (arch.embedding if table == "embedding" else arch.head).rpartition(".")[2]
    tokens = _trained_tokens(config.get("trainable_token_indices"), module) if DELTA in used else []
    tensors = {end: tensor.float() for end, tensor in used.items()}
    form = _check_form(tensors, arch.hidden, len(tokens), where)
    if form == "lora":
        embedding = EMBEDDING[0] in tensors
        A, B = (tensors[name] for name in (EMBEDDING if embedding else LINEAR))
        rows, shared = check_values((A.T if embedding else B) * scaling(len(A)), B.T if embedding else A, where=where)
        return TableUpdate("lora", torch.arange(len(rows)), rows, shared, names)
    if old is None:
        raise needs_backbone_error(f"the update of the {table} is saved as new values")
    weight = old.tensor(f"{arch.embedding if table == 'embedding' or arch.tied else arch.head}.weight")
    if form == "full":
        delta, ids = tensors["weight"].clone(), torch.arange(len(tensors["weight"]))
        count = min(len(weight), len(delta))  # further rows belong to tokens that were added to the backbone
        delta[:count] -= weight[:count]
    else:
        if not all(type(token) is int and 0 <= token < len(weight) for token in tokens):
            raise _indices_error(where, repr(tokens)[:80], f"distinct integers from 0 to {len(weight) - 1}")
        ids = torch.tensor(sorted(tokens))
        delta = tensors[DELTA][torch.tensor(tokens).argsort()] - weight[ids]
    check_values(delta, where=where)
    return TableUpdate(form, ids, delta, torch.eye(delta.shape[1]), names)


def _check_form(tensors: Mapping[str, Tensor], hidden: int, count: int, where: str) -> str:
    """Return the form of a table's tensors; raise `LoraSuiteError` unless all are there and have the right shape."""
    rank = next((len(tensors[end]) for end in (EMBEDDING[0], LINEAR[0]) if end in tensors and tensors[end].ndim), 0)
    # shapes, where -1 is any size
    forms = (
        ("lora", dict(zip(EMBEDDING, ((rank, -1), (hidden, rank)), strict=True))),
        ("lora", dict(zip(LINEAR, ((rank, hidden), (-1, rank)), strict=True))),
        ("full", {"weight": (-1, hidden)}), ("tokens", {DELTA: (count, hidden)}),
    )  # fmt: skip
    form, wanted = next(((form, wanted) for form, wanted in forms if set(wanted) & set(tensors)), ("", {}))
    for end in sorted({*wanted, *tensors}):
        got, shape = tuple(tensors[end].shape) if end in tensors else None, wanted.get(end)
        fits = got and shape and len(got) == len(shape) and all(w in (-1, g) for g, w in zip(got, shape, strict=True))
        if not fits or not all(got or ()):
            raise LoraSuiteError(
                "a token table's update does not fit the old backbone", where=f"{where}, {end}", got=got or "none",
                wanted=str(shape).replace("-1", "any") if shape else "none",
                do="fetch the adapter again, or pass the backbone that it was trained on (--from, source_model=)",
            )  # fmt: skip
    return form


def _trained_tokens(indices: Any, module: str) -> list[int]:
    """Return the ids of a table's trained tokens; the config has one list for all tables, or one per table."""
    if isinstance(indices, dict):
        indices = next((values for name, values in indices.items() if name.endswith(module)), None)
    if not isinstance(indices, list) or len({repr(token) for token in indices}) < max(len(indices), 1):
        raise _indices_error(module, repr(indices)[:80], "a list of distinct integers")
    return indices


def _indices_error(where: str, got: str, wanted: str) -> LoraSuiteError:
    return LoraSuiteError(
        "malformed trainable_token_indices in the adapter's config", where=where, got=got, wanted=wanted,
        do="fix the config, or fetch the adapter again",
    )  # fmt: skip


def needs_backbone_error(why: str) -> LoraSuiteError:
    """Build the error for an adapter that cannot be read without its backbone."""
    return LoraSuiteError(
        f"{why}, so the old backbone is needed to read it", do="pass the old backbone (--from, old=, source_model=)"
    )


def table_tensors(
    table: str, update: TableUpdate, new: Backbone, prefix: str, rank: int, generator: torch.Generator
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the PEFT tensors of a token table's update, and the config entries that belong to them.

    Args:
        table: ``embedding`` or ``head``.
        update: The update, for the tokens of the new backbone.
        new: The new backbone.
        prefix: Prefix of tensor names.
        rank: Rank of a LoRA.
        generator: Source of the random rows that fill the rank up.
    """
    arch = new.arch
    path = arch.embedding if table == "embedding" else arch.head
    short, module = path.rpartition(".")[2], f"{prefix}{path}"
    if update.form == "lora":
        resized = LowRank(update.shared, update.rows).truncated(rank)[0].padded(rank, generator)
        rows = torch.zeros(arch.vocabulary, rank)
        rows[update.ids] = resized.B
        if table == "head":
            return {f"{module}.lora_A.weight": resized.A, f"{module}.lora_B.weight": rows}, {"target_modules": [path]}
        factors = {"lora_embedding_A": rows.T.contiguous(), "lora_embedding_B": resized.A.T.contiguous()}
        return {f"{module}.{end}": tensor for end, tensor in factors.items()}, {"target_modules": [path]}
    weight = new.tensor(f"{path}.weight")
    changed = weight[update.ids] + update.rows @ update.shared
    if update.form == "full":
        weight = weight.clone()
        weight[update.ids] = changed
        return {f"{module}.weight": weight}, {"modules_to_save": [short]}
    order = update.ids.argsort()
    values = {f"{module}.{DELTA}": changed[order].contiguous()}
    return values, {"trainable_token_indices": {short: update.ids[order].tolist()}}
