"""Which method `auto` takes, and whether an upgrade is likely to hold.

Read off the map, before anything is run; once a method has fitted the new model to what the adapter does, also off how
well it could. Thresholds were chosen on the development points of ``benchmarks/gate.py`` and checked on others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..mapping.upgrade_map import UpgradeMap
from .prediction import EXPLAINED, NEAR, explained, near


@dataclass(frozen=True)
class Choice:
    """The method that `auto` takes, and why."""

    method: str
    why: str


def one_lineage(upgrade_map: UpgradeMap) -> bool:
    """Whether the new backbone is the old one, trained on: nearly equal embeddings, heads and units in place."""
    if near(upgrade_map) < 1 - NEAR:
        return False
    turned = [
        float((fit.T - torch.eye(fit.T.shape[-1])).norm() / fit.T.norm().clamp(min=1e-30))
        for pair in upgrade_map.layers
        for fit in pair.head_fits.values()
    ]
    return all(value <= NEAR for value in turned)


def pick(upgrade_map: UpgradeMap, *, can_run: bool) -> Choice:
    """Pick a method by what the map says and what is at hand.

    Args:
        upgrade_map: The pair's map.
        can_run: Whether both backbones are at hand without a download that the upgrade does not need anyway.
    """
    share = explained(upgrade_map)
    if one_lineage(upgrade_map):
        return Choice("copy", "embeddings and heads of both backbones are nearly the same: one lineage")
    if share >= EXPLAINED:
        return Choice(
            "lorasuite", f"the maps explain {share:.0%} of the new heads' weights: weights can be transferred"
        )
    if can_run:
        return Choice("transplant", f"the maps explain only {share:.0%} of the new heads' weights; both can be run")
    return Choice(
        "lorasuite",
        f"the old backbone is not at hand; the maps explain only {share:.0%} of the new heads' weights, and "
        f"method='transplant' would recover more, at the cost of {_cost(upgrade_map)}",
    )


def _cost(upgrade_map: UpgradeMap) -> str:
    """What running both backbones takes, counted from their shapes at two bytes a weight."""
    old, new = (2 * identity.arch.parameter_count() for identity in (upgrade_map.old, upgrade_map.new))
    return (
        f"fetching the old backbone ({_bytes(old)}), loading it and then the new one ({_bytes(new)}), and a few passes "
        "of each over the prompts"
    )


def _bytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
