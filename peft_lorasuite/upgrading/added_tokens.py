"""Adding the tokens of an adapter's tokenizer to the new backbone, with rows that come from the old tables."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..adapters.adapter import Adapter
from ..adapters.added_tokens import AddedTokens
from ..mapping.upgrade_map import UpgradeMap
from ..models.backbone import Backbone
from ..models.extended import ExtendedBackbone, TableRows
from ..text.vocabulary import shared_tokens
from .token_tables import map_rows


@dataclass(frozen=True, eq=False)
class NewTokens:
    """The added tokens on the new backbone.

    Attributes:
        backbone: The new backbone with their rows.
        ids: ``embedding`` or ``head`` -> new ids of the tokens whose rows belong to the result.
        tokenizer: The new tokenizer with the tokens that it lacked; None if it lacked none.
        facts: Entry of the report.
    """

    backbone: Backbone | None
    ids: Mapping[str, Tensor] = field(default_factory=dict)
    tokenizer: Any = None
    facts: Mapping[str, Any] = field(default_factory=dict)


def add_tokens(adapter: Adapter, upgrade_map: UpgradeMap, new: Backbone, *, by_behavior: bool) -> NewTokens:
    """Match the tokens that were added to the old backbone with those of the new one, by text, and add the others.

    Args:
        adapter: The old adapter, with added tokens.
        upgrade_map: The map of the pair.
        new: The new backbone.
        by_behavior: Whether the method transfers the adapter's behavior: then tokens that the new backbone knows keep
            their rows, and the rows of the others contain what the adapter adds to them.
    """
    added = adapter.added
    if added is None:
        return NewTokens(new)
    lost = dict(added.lost)
    matched, missing = _match(added, new)
    if adapter.arch.embedding_norm or new.arch.embedding_norm:
        lost |= dict.fromkeys(added.saved, "the embedding is followed by a norm, and rows are not mapped through it")
        matched, missing = {}, []
    own = added.backbone.tokenizer.added_tokens_decoder
    lost |= {token: "the new tokenizer lacks it, and it is part of the old vocabulary rather than an added token"
             for token in missing if added.saved[token] not in own}  # fmt: skip
    missing = [token for token in missing if token not in lost]
    tokenizer = _grow(added, new, missing) if missing else new.tokenizer
    placed = matched | {token: tokenizer.convert_tokens_to_ids(token) for token in missing}
    moved = {added.saved[token]: number for token, number in placed.items() if token in missing or not by_behavior}
    size = max([new.arch.vocabulary, *(number + 1 for number in placed.values())])  # as PEFT resizes: never smaller
    values = _new_rows(adapter, upgrade_map, new, moved, whole=by_behavior)
    backbone = ExtendedBackbone(new, tokenizer, TableRows(size, values)) if values else new
    facts = {
        "matched": sorted(matched),
        "added": missing,
        "lost": lost,
        "rows": size if size > new.arch.vocabulary else None,
    }
    return NewTokens(
        backbone, {table: ids for table, (ids, _) in values.items()}, tokenizer if missing else None, facts
    )


SHOWN = 8
"""Tokens that a sentence names."""


def describe(facts: Mapping[str, Any]) -> list[str]:
    """Return sentences about the added tokens for the terminal and the card."""
    lines = []
    if facts["added"]:
        resize = f"; resize_token_embeddings({facts['rows']}) comes before PeftModel.from_pretrained"
        lines.append(
            f"added to the new tokenizer, which is saved with the adapter: {_names(facts['added'])}"
            f"{resize if facts['rows'] else ''}"
        )
    if facts["lost"]:
        reasons = "; ".join(dict.fromkeys(facts["lost"].values()))
        lines.append(f"added tokens that are not transferred: {_names(list(facts['lost']))} ({reasons})")
    return lines


def _names(tokens: list[str]) -> str:
    more = f" and {len(tokens) - SHOWN} more" if len(tokens) > SHOWN else ""
    return ", ".join(map(repr, tokens[:SHOWN])) + more


def _match(added: AddedTokens, new: Backbone) -> tuple[dict[str, int], list[str]]:
    """Return the saved tokens that the new backbone has, with their new ids, and those that it lacks."""
    rows = {"old_rows": added.backbone.arch.vocabulary, "new_rows": new.arch.vocabulary}
    pairs = dict(
        zip(*(ids.tolist() for ids in shared_tokens(added.backbone.tokenizer, new.tokenizer, **rows)), strict=True)
    )
    matched = {token: pairs[number] for token, number in added.saved.items() if number in pairs}
    return matched, [token for token in added.saved if token not in matched]


def _grow(added: AddedTokens, new: Backbone, missing: list[str]) -> Any:
    """Return a copy of the new tokenizer with further tokens, which keep their flags and their roles."""
    old, tokenizer = added.backbone.tokenizer, copy.deepcopy(new.tokenizer)
    tokenizer.add_tokens([old.added_tokens_decoder[added.saved[token]] for token in missing])
    for role in ("eos_token", "pad_token"):
        token = getattr(old, role)
        if token in missing:
            setattr(tokenizer, role, token)
    return tokenizer


def _new_rows(
    adapter: Adapter, upgrade_map: UpgradeMap, new: Backbone, moved: Mapping[int, int], *, whole: bool
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the new ids and rows by table.

    Args:
        adapter: The old adapter.
        upgrade_map: The map of the pair.
        new: The new backbone.
        moved: Old id -> new id.
        whole: Whether the rows contain the adapter's updates of the tables.
    """
    assert adapter.added is not None
    old, values = adapter.added.backbone, {}
    for table in ("embedding", "head"):
        known = "embedding" if table == "embedding" or old.arch.tied else "head"
        if (table == "head" and new.arch.tied) or known not in old.rows.values:
            continue
        saved = set(old.rows.values[known][0].tolist())
        ids = [number for number in moved if number in saved]
        if not ids:
            continue
        rows = old.tensor(f"{old.arch.embedding if known == 'embedding' else old.arch.head}.weight")
        update = adapter.tables.get(table)
        if update is not None and whole:
            rows[update.ids] += update.rows @ update.shared
        mapped = map_rows(table, rows[ids], old, new, upgrade_map.hidden, upgrade_map.inverse)
        values[table] = torch.tensor([moved[number] for number in ids]), mapped
    return values
