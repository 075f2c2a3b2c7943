"""The transfer as the reference code of the LoRASuite paper computes it (Eq. 3), for comparison."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arch.layout import group_of, heads_first, place_rows
from ..arch.spec import ATTENTION, OUTPUT_PROJECTIONS
from ..linalg.basis import pseudo_inverse
from ..linalg.lowrank import LowRank
from ..mapping.layer_pair import LayerPair
from ..mapping.upgrade_map import UpgradeMap
from ..models.backbone import Backbone


def paper_move(
    upgrade_map: UpgradeMap, pair: LayerPair, part: str, update: LowRank, old: Backbone, new: Backbone
) -> tuple[LowRank, dict[str, float]]:
    """Transfer one part by Eq. 3: ``T_Q = Q_a W_h Q_b^T``, ``dQ_b = T_Q^T dQ_a W_h``, and likewise for other parts.

    The products are not normalized, so the norm of the result is arbitrary; the paper relies on fine-tuning to correct
    it. A ``lora_bias``, which the paper does not cover, is transferred like a column of B.
    """
    weights = old.part(pair.old, part), new.part(pair.new, part)
    if update.bias is None:
        return _factors(upgrade_map, pair, part, update, *weights), {}
    A, B = torch.cat([update.A, torch.zeros_like(update.A[:1])]), torch.cat([update.B, update.bias[:, None]], dim=1)
    moved = _factors(upgrade_map, pair, part, LowRank(A, B), *weights)
    return LowRank(moved.A[:-1], moved.B[:, :-1], moved.B[:, -1]), {}


def _factors(
    upgrade_map: UpgradeMap, pair: LayerPair, part: str, update: LowRank, old_weight: Tensor, new_weight: Tensor
) -> LowRank:
    if part in ATTENTION:
        return _heads(upgrade_map, pair, part, update, old_weight, new_weight)
    W = upgrade_map.hidden
    if part in OUTPUT_PROJECTIONS:
        A = update.A @ pseudo_inverse(old_weight) @ W @ new_weight
        return LowRank(A, upgrade_map.inverse @ update.B)
    B = new_weight @ (upgrade_map.inverse @ (pseudo_inverse(old_weight) @ update.B))
    return LowRank(update.A @ W, B)


def _heads(
    upgrade_map: UpgradeMap, pair: LayerPair, part: str, update: LowRank, old_weight: Tensor, new_weight: Tensor
) -> LowRank:
    W = upgrade_map.hidden
    old, new = upgrade_map.old.arch.in_layer(pair.old).heads, upgrade_map.new.arch.in_layer(pair.new).heads
    left, right = pair.heads[:, 0], pair.heads[:, 1]
    if part in ("k", "v"):
        left, right = group_of(old)[left], group_of(new)[right]
    T = heads_first(old_weight, part, old)[left] @ W @ heads_first(new_weight, part, new)[right].mT
    own = (update.A.T if part == "o" else update.B).reshape(old.count(part), old.size, -1)[left]
    rows = place_rows(T.mT @ own, right, new.count(part))[0]
    if part == "o":
        return LowRank(rows.T, W.T @ update.B)
    return LowRank(update.A @ W, rows)
