"""Transferring updates of the embedding and the head, for the tokens that both vocabularies have."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..adapters.token_tables import TableUpdate
from ..arch.spec import Architecture
from ..linalg.basis import Basis
from ..models.backbone import Backbone
from ..text.vocabulary import shared_tokens


def transfer_table(
    table: str, update: TableUpdate, old: Backbone, new: Backbone, hidden: Tensor, inverse: Tensor
) -> tuple[TableUpdate | None, dict[str, Any]]:
    """Transfer the update of a token table.

    Args:
        table: ``"embedding"`` or ``"head"``.
        update: Its update on the old backbone.
        old: The old backbone.
        new: The new backbone.
        hidden: The hidden map, (old hidden size, new hidden size).
        inverse: Its inverse, (new hidden size, old hidden size).

    Returns:
        The update on the new backbone, None if it cannot be transferred; and facts for the report, with the reason
        under ``refused`` then.
    """
    reason = _refusal(table, update, old.arch, new.arch)
    if reason:
        return None, {"refused": reason}
    left, right = shared_tokens(
        old.tokenizer, new.tokenizer, old_rows=old.arch.vocabulary, new_rows=new.arch.vocabulary
    )
    new_id = torch.full((max(old.arch.vocabulary, int(update.ids.max()) + 1),), -1)
    new_id[left] = right
    target = new_id[update.ids]
    kept = target >= 0
    energy = ((update.rows @ (update.shared @ update.shared.T)) * update.rows).sum(dim=1)  # of each token's row
    share = float(energy[kept].sum() / energy.sum().clamp(min=1e-30)) if bool(energy.any()) else 1.0
    facts = {"rows": int(kept.sum()), "of": len(kept), "energy": round(share, 6)}
    if not bool(kept.any()):
        return None, {**facts, "refused": "the new vocabulary has none of its tokens: train them on the new backbone"}
    if table == "embedding":
        shared = update.shared @ hidden * (old.arch.embedding_scale / new.arch.embedding_scale)
    else:
        shared = _map_head_rows(update.shared, old, new, hidden, inverse, left, right)
    return replace(update, ids=target[kept], rows=update.rows[kept], shared=shared), facts


def _refusal(table: str, update: TableUpdate, old: Architecture, new: Architecture) -> str:
    if table == "embedding" and (old.embedding_norm or new.embedding_norm):
        return "the embedding is followed by a norm, and its update is not linear in the normalized states"
    if table == "embedding" and update.form == "tokens" and new.tied and not old.tied:
        return "the new backbone's head is its embedding and would change too; train the embedding as LoRA instead"
    if table == "head" and new.tied and update.form != "lora":
        return "the new backbone's head is its embedding; train the head as LoRA instead"
    return ""


def _map_head_rows(
    rows: Tensor, old: Backbone, new: Backbone, hidden: Tensor, inverse: Tensor, left: Tensor, right: Tensor
) -> Tensor:
    """Map rows of the head to the new final state, scaled to the norm of the new head's own rows."""
    gains = [one.tensor(f"{one.arch.final_norm}.weight") + one.arch.gain_offset for one in (old, new)]
    basis = Basis(hidden, inverse, gains[0], gains[1])
    mapped = basis.map_inputs(old.unembedding()[left].float()).norm()
    return basis.map_inputs(rows) * (float(new.unembedding()[right].float().norm()) / float(mapped.clamp(min=1e-30)))
