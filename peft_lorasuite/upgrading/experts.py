"""The experts of a result: brought to its rank, with their modules and the fates of their tensors for the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..adapters.adapter import Adapter
from ..adapters.experts import ExpertKey, join_experts, parameter_path
from ..arch.experts import PARAMETERS, ROUTER
from ..linalg.lowrank import LowRank
from ..methods.base import MethodResult, MovedExperts
from .report import fates_of


def add_experts(
    result: Adapter, source: Adapter, method_result: MethodResult, method: str, rank: int
) -> tuple[Adapter, list[dict[str, Any]], dict[str, str]]:
    """Add the transferred experts to a result.

    Returns:
        The result, its 3-D parameters for the report, and the fates of the tensors of the old experts.
    """
    if not source.experts:
        return result, [], {}
    moved = method_result.experts
    if moved is None:
        by_behavior = method_result.updates and not method_result.sources
        reason = "" if by_behavior else f"{method} does not transfer experts"
        moved = MovedExperts(dropped=dict.fromkeys(source.experts, reason) if reason else {})
    updates: dict[ExpertKey, LowRank] = {}
    modules = []
    for (layer, parameter), experts in join_experts(moved.updates, result.arch).items():
        kept = []
        for expert, whole in enumerate(experts):
            if not whole.rank:
                continue
            truncated, share = whole.truncated(rank) if whole.rank > rank else (whole, 1.0)
            kept.append((share, truncated.norm()))
            updates |= _parts(truncated, layer, expert, parameter, result)
        modules.append(_module(result, moved, layer, parameter, kept))
    fates = fates_of(source.expert_names, moved.dropped)
    return replace(result, experts=updates), modules, fates


def _parts(update: LowRank, layer: int, expert: int, parameter: str, result: Adapter) -> dict[ExpertKey, LowRank]:
    if parameter in (ROUTER, PARAMETERS[1]):
        return {(layer, expert, ROUTER if parameter == ROUTER else "down"): update}
    half = len(update.B) // 2
    return {(layer, expert, "gate"): LowRank(update.A, update.B[:half]),
            (layer, expert, "up"): LowRank(update.A, update.B[half:])}  # fmt: skip


def _module(
    result: Adapter, moved: MovedExperts, layer: int, parameter: str, kept: list[tuple[float, float]]
) -> dict[str, Any]:
    """Describe a 3-D parameter for the report; figures are means over its experts."""
    parts = {ROUTER: (ROUTER,), PARAMETERS[1]: ("down",)}.get(parameter, ("gate", "up"))
    keys = [key for key in moved.updates if key[0] == layer and key[2] in parts]
    return {
        "module": parameter_path(layer, parameter, result.arch),
        "from": {key[2]: [moved.sources[key][0], key[2]] for key in keys},
        "energy_kept": round(sum(share for share, _ in kept) / max(len(kept), 1), 6),
        "norm": round(sum(norm**2 for _, norm in kept) ** 0.5, 6),
        "figures": {part: _mean([moved.figures[key] for key in keys if key[2] == part and key in moved.figures])
                    for part in parts},
    }  # fmt: skip


def _mean(figures: list[Mapping[str, float]]) -> dict[str, float]:
    return {
        name: round(sum(one[name] for one in figures) / len(figures), 6) for name in (figures[0] if figures else ())
    }
