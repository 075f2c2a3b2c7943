"""Updates of the token tables, that is, the embedding and the language-model head, in all forms that PEFT saves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..arch.spec import Architecture
from ..compat import require
from ..errors import LoraSuiteError
from ..linalg.lowrank import LowRank, check_values
from ..models.backbone import Backbone
from .peft_format import PREFIX

EMBEDDING, LINEAR = ("lora_embedding_A", "lora_embedding_B"), ("lora_A.weight", "lora_B.weight")
DELTA = "token_adapter.trainable_tokens_delta"
"""Endings of tensor names: LoRA of an embedding or a linear head, and new values of single tokens."""


@dataclass(frozen=True, eq=False)
class TableUpdate:
    """The change ``rows @ shared`` of some rows of a token table.

    Attributes:
        form: ``lora``, ``full`` (``modules_to_save``) or ``tokens`` (``trainable_token_indices``); the result is saved
            in the same form.
        ids: Token ids of the rows, ``(tokens,)``; none if the table was saved and is the backbone's own.
        rows: ``(tokens, rank)``.
        shared: ``(rank, hidden)``.
        names: Names of the tensors that it was read from.
        bias: Change of the head's bias, ``(tokens,)``, if it was trained.
    """

    form: str
    ids: Tensor
    rows: Float[Tensor, "tokens rank"]
    shared: Float[Tensor, "rank hidden"]
    names: tuple[str, ...]
    bias: Float[Tensor, " tokens"] | None = None


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
    tokens = trained_tokens(config.get("trainable_token_indices"), table, arch) if DELTA in used else []
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
        ids, saved = torch.arange(len(weight)), used["weight"]
    else:
        if tokens and max(tokens) >= len(weight):
            raise _indices_error(where, repr(tokens)[:80], f"distinct integers from 0 to {len(weight) - 1}")
        ids, order = torch.tensor(tokens).sort()
        saved = used[DELTA][order]
    changed = (saved != weight[ids].to(saved.dtype)).any(dim=1)  # compared in the dtype in which they were saved
    bias = None
    if form == "full" and "bias" in tensors:
        bias = tensors["bias"] - old.tensor(f"{arch.head}.bias")
        changed |= bias != 0
        bias = bias[changed]
    ids, delta = ids[changed], saved[changed].float() - weight[ids[changed]]
    check_values(delta, where=where)
    return TableUpdate(form, ids, delta, torch.eye(arch.hidden), names, bias)


def _check_form(tensors: Mapping[str, Tensor], hidden: int, count: int, where: str) -> str:
    """Return the form of a table's tensors; raise `LoraSuiteError` unless all are there and have the right shape."""
    rank = next((len(tensors[end]) for end in (EMBEDDING[0], LINEAR[0]) if end in tensors and tensors[end].ndim), 0)
    # shapes, where -1 is any size
    forms = (
        ("lora", dict(zip(EMBEDDING, ((rank, -1), (hidden, rank)), strict=True))),
        ("lora", dict(zip(LINEAR, ((rank, hidden), (-1, rank)), strict=True))),
        ("full", {"weight": (-1, hidden), **{end: (-1,) for end in tensors if end == "bias"}}),
        ("tokens", {DELTA: (count, hidden)}),
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


def trained_tokens(indices: Any, table: str, arch: Architecture) -> list[int]:
    """Return the ids of a table's trained tokens.

    The config has one list for all tables, or one per module; a tied head follows the embedding.

    Raises:
        LoraSuiteError: If the config names none, or names them twice, or if PEFT is too old for two tied tables.
    """
    module = (arch.embedding if table == "embedding" else arch.head).rpartition(".")[2]
    if isinstance(indices, dict):
        named = {name.rpartition(".")[2]: values for name, values in indices.items()}
        other = arch.embedding.rpartition(".")[2]
        if arch.tied and {other, arch.head} <= set(named):
            require("peft", "0.19", "trainable_token_indices of both tables of a tied backbone")
        indices = named.get(module, named.get(other) if table == "head" and arch.tied else None)
    valid = isinstance(indices, list) and all(type(token) is int and token >= 0 for token in indices)
    if not valid or len(set(indices)) < max(len(indices), 1):
        raise _indices_error(module, repr(indices)[:80], "a list of distinct integers")
    return indices


def tied_copies(
    groups: Mapping[str, Mapping[str, str]], tensors: Mapping[str, Tensor], arch: Architecture
) -> list[str]:
    """Return the names of trained tokens that change nothing: an empty list, and those of a tied head.

    PEFT saves the tokens of a tied embedding once more for the head.

    Args:
        groups: Module -> ending -> saved name.
        tensors: Saved name -> tensor.
        arch: Architecture of the backbone.
    """
    found = {path: owned[DELTA] for path, owned in groups.items() if DELTA in owned}
    empty = [name for name in found.values() if not tensors[name].numel()]
    head, embedding = found.get(arch.head), found.get(arch.embedding)
    if not arch.tied or head is None or embedding is None or head in empty:
        return empty
    same = torch.equal(tensors[head].float(), tensors[embedding].float())
    return [*empty, head] if same else empty


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
    table: str, update: TableUpdate, new: Backbone, rank: int, generator: torch.Generator, added: Tensor
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the PEFT tensors of a token table's update, and the config entries that belong to them.

    Args:
        table: ``embedding`` or ``head``.
        update: The update, for the tokens of the new backbone.
        new: The new backbone, with the rows of added tokens.
        rank: Rank of a LoRA.
        generator: Source of the random rows that fill the rank up.
        added: Ids of the added tokens, whose rows are saved in any case.
    """
    arch = new.arch
    path = arch.embedding if table == "embedding" else arch.head
    short, module = path.rpartition(".")[2], f"{PREFIX}{path}"
    weight = new.tensor(f"{arch.embedding if arch.tied else path}.weight").clone()  # it may be the model's own
    if update.form == "lora":
        resized = LowRank(update.shared, update.rows).truncated(rank)[0].padded(rank, generator)
        rows = torch.zeros(arch.vocabulary, rank)
        rows[update.ids] = resized.B
        copy = {f"{module}.base_layer.weight": weight} if len(added) else {}
        if table == "head":
            factors = {"lora_A.weight": resized.A, "lora_B.weight": rows}
        else:
            factors = {"lora_embedding_A": rows.T.contiguous(), "lora_embedding_B": resized.A.T.contiguous()}
        return {f"{module}.{end}": tensor for end, tensor in factors.items()} | copy, {"target_modules": [path]}
    weight[update.ids] += update.rows @ update.shared
    bias = _head_bias(new) if table == "head" else None
    if bias is not None and update.bias is not None:
        bias[update.ids] += update.bias
    if update.form == "full" or bias is not None:  # PEFT's token adapter leaves out the head's bias
        tensors = {f"{module}.weight": weight} | ({} if bias is None else {f"{module}.bias": bias})
        return tensors, {"modules_to_save": [short]}
    ids = torch.cat([update.ids, added]).unique()
    return {f"{module}.{DELTA}": weight[ids]}, {"trainable_token_indices": {short: ids.tolist()}}


def _head_bias(new: Backbone) -> Tensor | None:
    path = f"{new.arch.head}.bias"
    try:
        new.locate(path)
    except LoraSuiteError:
        return None
    return new.tensor(path).clone()
