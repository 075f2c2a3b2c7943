"""Updates of the token tables, embedding and head: rows go by the shared tokens, columns through the hidden map."""

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


@dataclass(frozen=True, eq=False)
class TableUpdate:
    """The change ``rows @ shared`` of some rows of a token table.

    Attributes:
        form: ``lora``, ``full`` (modules_to_save) or ``tokens`` (trainable_token_indices): what it is saved as again.
        ids: Token ids of the rows, (n,).
        rows: ``(n, r)``.
        shared: ``(r, D)``.
        names: Tensors that it was read from.
    """

    form: str
    ids: Tensor
    rows: Float[Tensor, "tokens rank"]
    shared: Float[Tensor, "rank hidden"]
    names: tuple[str, ...]


def find_table(module: str, arch: Architecture) -> str | None:
    """Return ``embedding`` or ``head`` if a module path is one of them, under its name in memory or on disk."""
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
    """Read one table's update, whichever of its forms the adapter has; ``scaling`` gives it for a rank."""
    module = (arch.embedding if table == "embedding" else arch.head).rpartition(".")[2]
    chosen = _trained_tokens(config.get("trainable_token_indices"), module) if DELTA in used else []
    found = {end: tensor.float() for end, tensor in used.items()}
    form = _check_form(found, arch.hidden, len(chosen), where)
    if form == "lora":
        embedding = "lora_embedding_A" in found
        A, B = (found[name] for name in (EMBEDDING if embedding else LINEAR))
        rows, shared = check_values((A.T if embedding else B) * scaling(len(A)), B.T if embedding else A, where=where)
        return TableUpdate("lora", torch.arange(len(rows)), rows, shared, names)
    if old is None:
        raise needs_backbone_error(f"the update of the {table} is stored as new values")
    weight = old.tensor(f"{arch.embedding if table == 'embedding' or arch.tied else arch.head}.weight")
    if form == "full":
        delta, ids = found["weight"].clone(), torch.arange(len(found["weight"]))
        count = min(len(weight), len(delta))  # rows beyond the backbone's are tokens that were added to it
        delta[:count] -= weight[:count]
    else:
        if not all(type(token) is int and 0 <= token < len(weight) for token in chosen):
            raise _indices_error(where, repr(chosen)[:80], f"different numbers from 0 to {len(weight) - 1}")
        ids = torch.tensor(sorted(chosen))
        delta = found[DELTA][torch.tensor(chosen).argsort()] - weight[ids]
    check_values(delta, where=where)
    return TableUpdate(form, ids, delta, torch.eye(delta.shape[1]), names)


def _check_form(found: Mapping[str, Tensor], hidden: int, count: int, where: str) -> str:
    """Return the form that a table's tensors are in, after looking at their names and shapes; -1 is any number."""
    rank = next((len(found[end]) for end in (EMBEDDING[0], LINEAR[0]) if end in found and found[end].ndim), 0)
    forms = (
        ("lora", dict(zip(EMBEDDING, ((rank, -1), (hidden, rank)), strict=True))),
        ("lora", dict(zip(LINEAR, ((rank, hidden), (-1, rank)), strict=True))),
        ("full", {"weight": (-1, hidden)}), ("tokens", {DELTA: (count, hidden)}),
    )  # fmt: skip
    form, wanted = next(((form, wanted) for form, wanted in forms if set(wanted) & set(found)), ("", {}))
    for end in sorted({*wanted, *found}):
        got, shape = tuple(found[end].shape) if end in found else None, wanted.get(end)
        fits = got and shape and len(got) == len(shape) and all(w in (-1, g) for g, w in zip(got, shape, strict=True))
        if not fits or not all(got or ()):
            raise LoraSuiteError(
                "a token table's update does not fit the old backbone", where=f"{where}, {end}", got=got or "none",
                wanted=str(shape).replace("-1", "any") if shape else "none",
                do="fetch the adapter again, or name the backbone that it was trained on (--from, source_model=)",
            )  # fmt: skip
    return form


def _trained_tokens(indices: Any, module: str) -> list[int]:
    """Return which tokens of a table were trained; the config names them for every table, or by table."""
    if isinstance(indices, dict):
        indices = next((values for name, values in indices.items() if name.endswith(module)), None)
    if not isinstance(indices, list) or len({repr(token) for token in indices}) < max(len(indices), 1):
        raise _indices_error(module, repr(indices)[:80], "a list of different numbers")
    return indices


def _indices_error(where: str, got: str, wanted: str) -> LoraSuiteError:
    return LoraSuiteError(
        "trainable_token_indices does not name the trained tokens", where=where, got=got, wanted=wanted,
        do="mend the adapter's config, or fetch it again",
    )  # fmt: skip


def needs_backbone_error(why: str) -> LoraSuiteError:
    """Build the error for an adapter that cannot be read without its backbone."""
    return LoraSuiteError(
        f"{why}: to read it, the old backbone is needed", do="name the old backbone (--from, old=, source_model=)"
    )


def table_tensors(
    table: str, update: TableUpdate, new: Backbone, prefix: str, rank: int, generator: torch.Generator
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the PEFT tensors of a table's update on the new backbone, and what its config says of them."""
    arch = new.arch
    path = arch.embedding if table == "embedding" else arch.head
    short, module = path.rpartition(".")[2], f"{prefix}{path}"
    if update.form == "lora":
        even = LowRank(update.shared, update.rows).truncated(rank)[0].padded(rank, generator)
        rows = torch.zeros(arch.vocabulary, rank)
        rows[update.ids] = even.B
        if table == "head":
            return {f"{module}.lora_A.weight": even.A, f"{module}.lora_B.weight": rows}, {"target_modules": [path]}
        ends = {"lora_embedding_A": rows.T.contiguous(), "lora_embedding_B": even.A.T.contiguous()}
        return {f"{module}.{end}": tensor for end, tensor in ends.items()}, {"target_modules": [path]}
    weight = new.tensor(f"{path}.weight")
    changed = weight[update.ids] + update.rows @ update.shared
    if update.form == "full":
        weight = weight.clone()
        weight[update.ids] = changed
        return {f"{module}.weight": weight}, {"modules_to_save": [short]}
    order = update.ids.argsort()
    tokens = {f"{module}.token_adapter.trainable_tokens_delta": changed[order].contiguous()}
    return tokens, {"trainable_token_indices": {short: update.ids[order].tolist()}}
