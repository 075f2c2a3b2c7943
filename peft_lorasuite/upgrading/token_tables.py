"""Transferring updates of the embedding and the head, for the tokens that both vocabularies have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..adapters.adapter import Adapter
from ..adapters.plain import exact_lora
from ..adapters.token_tables import TableUpdate, table_tensors
from ..arch.spec import Architecture
from ..linalg.basis import Basis
from ..linalg.lowrank import LowRank
from ..methods.base import MethodInput
from ..models.backbone import Backbone
from ..models.extended import ExtendedBackbone
from ..text.vocabulary import shared_tokens

TABLES = ("embedding", "head")


def add_tables(
    result: Adapter, inputs: MethodInput, rank: int, added: Mapping[str, Tensor], *, by_id: bool = False,
    as_lora: bool = False,
) -> tuple[Adapter, dict[str, Any], dict[str, str]]:  # fmt: skip
    """Add the updates of the token tables to a result, and the rows of added tokens.

    Args:
        result: The new adapter.
        inputs: What the method was given.
        rank: Rank of a LoRA.
        added: Table -> new ids of added tokens.
        by_id: Whether rows keep their ids, those without a token included, because both sides have the same tables.
        as_lora: Whether the updates become a LoRA, exactly, where they are new values of rows.

    Returns:
        The result, facts by table, and the fates of the tables' tensors.
    """
    old, new = inputs.backbones("an adapter of the embedding or the head")
    facts, fates, moved = {}, {}, {}
    for table, update in _tables_to_transfer(inputs).items():
        moved[table], table_facts = transfer_table(
            table, update, old, new, inputs.map.hidden, inputs.map.inverse, by_id=by_id
        )
        facts[table] = table_facts
        if as_lora and moved[table] is not None:
            moved[table] = exact_lora(table, moved[table], rank, new.arch.tied)
        fates |= dict.fromkeys(update.names, _fate(table_facts))
    return write_tables(result, moved, new, rank, inputs.seed, added), facts, fates


def write_tables(
    result: Adapter, moved: Mapping[str, TableUpdate | None], new: Backbone, rank: int, seed: int,
    added: Mapping[str, Tensor],
) -> Adapter:  # fmt: skip
    """Return a result with the tensors of the token tables.

    Args:
        result: The new adapter.
        moved: Table -> its update for the tokens of the new backbone; without one, only rows of added tokens change.
        new: The new backbone, with the rows of added tokens.
        rank: Rank of a LoRA.
        seed: Seed of the rows that fill the rank up.
        added: Table -> new ids of added tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    extras, settings = dict(result.extras), dict(result.settings)
    for table, update in _in_one_form(moved, new.arch, added).items():
        tensors, entries = table_tensors(table, update, new, rank, generator, added.get(table, NO_IDS))
        extras |= tensors
        if update.form == "lora":
            settings["r"] = rank
        for name, value in entries.items():
            settings[name] = _merge(settings.get(name), value)
    updates = result.updates
    if not updates and "target_modules" not in settings:  # PEFT loads no LoRA without a module: one that adds nothing
        part, layer = new.arch.parts[-1], new.arch.layers - 1
        rows, columns = new.arch.in_layer(layer).shape(part)
        A = torch.randn(1, columns, generator=generator) / columns**0.5
        updates = {(layer, part): LowRank(A, torch.zeros(rows, 1))}
    return replace(result, updates=updates, extras=extras, settings=settings)


NO_IDS = torch.zeros(0, dtype=torch.long)


def _in_one_form(
    moved: Mapping[str, TableUpdate | None], arch: Architecture, added: Mapping[str, Tensor]
) -> dict[str, TableUpdate]:
    """Return the updates to write: a tied head follows its embedding, so both are written in full if one differs."""
    none = TableUpdate("tokens", NO_IDS, torch.zeros(0, 1), torch.zeros(1, arch.hidden), ())
    updates = {table: moved.get(table) or none for table in TABLES if moved.get(table) or len(added.get(table, NO_IDS))}
    updates = {
        table: replace(update, form="tokens") if update.form == "full" and not len(update.ids) else update
        for table, update in updates.items()
    }
    updates = {table: one for table, one in updates.items() if len(one.ids) or len(added.get(table, NO_IDS))}
    in_full = any(update.form == "full" for update in updates.values())
    if arch.tied and in_full and (len(added.get("embedding", NO_IDS)) or "head" in updates):
        updates = {table: updates.get(table, none) for table in TABLES}
        updates = {t: one if one.form == "lora" else replace(one, form="full") for t, one in updates.items()}
    return updates


def _fate(facts: Mapping[str, Any]) -> str:
    if "refused" in facts:
        return f"not transferred: {facts['refused']}"
    partly = "" if facts["rows"] == facts["of"] else f" in part: {facts['rows']} of {facts['of']} tokens are shared"
    return f"transferred{partly}"


def transfer_table(
    table: str,
    update: TableUpdate,
    old: Backbone,
    new: Backbone,
    hidden: Tensor,
    inverse: Tensor,
    *,
    by_id: bool = False,
) -> tuple[TableUpdate | None, dict[str, Any]]:
    """Transfer the update of a token table.

    Args:
        table: ``"embedding"`` or ``"head"``.
        update: Its update on the old backbone.
        old: The old backbone.
        new: The new backbone.
        hidden: The hidden map, (old hidden size, new hidden size).
        inverse: Its inverse, (new hidden size, old hidden size).
        by_id: Whether rows keep their ids.

    Returns:
        The update on the new backbone, None if it cannot be transferred; and facts for the report, with the reason
        under ``refused`` then.
    """
    if not len(update.ids):
        none = {"shared": torch.zeros(1, new.arch.hidden), "rows": torch.zeros(0, 1), "bias": None}
        return replace(update, **none), {"rows": 0, "of": 0}
    reason = _refusal(table, update, old.arch, new.arch)
    if reason:
        return None, {"refused": reason}
    new_id, named = _new_ids(old, new, by_id=by_id)
    target, named = new_id[update.ids], named[update.ids]
    kept = target >= 0
    energy = ((update.rows @ (update.shared @ update.shared.T)) * update.rows).sum(dim=1)  # of each token's row
    share = float(energy[kept].sum() / energy[named].sum().clamp(min=1e-30)) if bool(energy[named].any()) else 1.0
    facts = {"rows": int(kept.sum()), "of": int(named.sum()), "energy": round(share, 6)}
    if not bool(kept.any()):
        return None, {**facts, "refused": "the new vocabulary has none of its tokens: train them on the new backbone"}
    shared = map_rows(table, update.shared, old, new, hidden, inverse)
    bias = None if update.bias is None else update.bias[kept]
    return replace(update, ids=target[kept], rows=update.rows[kept], shared=shared, bias=bias), facts


def _new_ids(old: Backbone, new: Backbone, *, by_id: bool) -> tuple[Tensor, Tensor]:
    """Return the new id of every old row, -1 where there is none, and whether the row is not padding."""
    rows = old.arch.vocabulary
    if by_id:
        ids = torch.arange(rows)
        return torch.where(ids < new.arch.vocabulary, ids, -1), torch.ones(rows, dtype=torch.bool)
    left, right = shared_tokens(old.tokenizer, new.tokenizer, old_rows=rows, new_rows=new.arch.vocabulary)
    new_id, named = torch.full((rows,), -1), torch.zeros(rows, dtype=torch.bool)
    new_id[left] = right
    named[[number for number in old.tokenizer.get_vocab().values() if number < rows]] = True
    return new_id, named


def _refusal(table: str, update: TableUpdate, old: Architecture, new: Architecture) -> str:
    if table == "embedding" and (old.embedding_norm or new.embedding_norm):
        return "the embedding is followed by a norm, and its update is not linear in the normalized states"
    if table == "embedding" and update.form == "tokens" and new.tied and not old.tied:
        return "the new backbone's head is its embedding and would change too; train the embedding as LoRA instead"
    if table == "head" and new.tied and update.form == "tokens":
        return "the new backbone's head is its embedding; train the head as LoRA instead"
    return ""


def map_rows(table: str, rows: Tensor, old: Backbone, new: Backbone, hidden: Tensor, inverse: Tensor) -> Tensor:
    """Map rows of a token table, (rows, old hidden size), to the new hidden space; see `transfer_table`.

    Rows of the head are scaled to the norm of the new head's own rows, if both checkpoints have one.
    """
    if table == "embedding":
        return rows @ hidden * (old.arch.embedding_scale / new.arch.embedding_scale)
    old, new = (one.base if isinstance(one, ExtendedBackbone) else one for one in (old, new))
    gains = [one.tensor(f"{one.arch.final_norm}.weight") + one.arch.gain_offset for one in (old, new)]
    basis = Basis(hidden, inverse, gains[0], gains[1])
    if not (_has_head(old) and _has_head(new)):
        return basis.map_inputs(rows)
    left, right = shared_tokens(
        old.tokenizer, new.tokenizer, old_rows=old.arch.vocabulary, new_rows=new.arch.vocabulary
    )
    mapped = basis.map_inputs(old.unembedding()[left].float()).norm()
    return basis.map_inputs(rows) * (float(new.unembedding()[right].float().norm()) / float(mapped.clamp(min=1e-30)))


def _tables_to_transfer(inputs: MethodInput) -> dict[str, TableUpdate]:
    """Return the updates of both tables; trained tokens of a tied embedding also update an untied new head."""
    tables = dict(inputs.adapter.tables)
    embedding = tables.get("embedding")
    tied = inputs.map.old.arch.tied and not inputs.map.new.arch.tied
    if embedding and embedding.form == "tokens" and len(embedding.ids) and tied:
        tables["head"] = embedding
    return tables


def _merge(first: Any, second: Any) -> Any:
    """Merge a setting of the embedding with that of the head: both are dicts or lists."""
    return second if first is None else ({**first, **second} if isinstance(second, dict) else [*first, *second])


def _has_head(backbone: Backbone) -> bool:
    """Return whether a checkpoint has a language-model head."""
    spellings = [backbone.arch.head, *(disk for memory, disk in backbone.arch.disk if memory == backbone.arch.head)]
    return backbone.arch.tied or any(f"{name}.weight" in backbone.weights for name in spellings)
