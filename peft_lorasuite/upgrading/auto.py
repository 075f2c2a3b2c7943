"""The choice of a method by ``method="auto"``, from the upgrade map, the prompts and what can be run.

Thresholds were chosen on the development points of ``benchmarks/gate.py`` and checked on other points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import LoraSuiteError
from ..mapping.same_base import Comparison, compare_pair
from ..mapping.upgrade_map import UpgradeMap
from ..methods.registry import Method
from ..models.task import CAUSAL, Task
from ..text.conversations import Conversation
from ..text.examples import PromptOrText
from .prediction import MAX_DISTANCE, MIN_EXPLAINED, embedding_similarity, explained_share


@dataclass(frozen=True)
class Choice:
    """The method that `auto` uses, and the reason."""

    method: str
    reason: str


def is_continued_training(upgrade_map: UpgradeMap) -> bool:
    """Whether the new backbone is the old one after more training: embeddings and heads are nearly the same.

    A map has nothing of experts, which may be in another order.
    """
    if upgrade_map.old.arch.experts or embedding_similarity(upgrade_map) < 1 - MAX_DISTANCE:
        return False
    distances = [
        float((fit.T - torch.eye(fit.T.shape[-1])).norm() / fit.T.norm().clamp(min=1e-30))
        for pair in upgrade_map.layers
        for fit in pair.head_fits.values()
    ]
    return all(distance <= MAX_DISTANCE for distance in distances)


def pick(
    upgrade_map: UpgradeMap, *, can_run: bool, task: Task = CAUSAL,
    prompts: Sequence[PromptOrText] | str | None = None, same: Comparison | None = None,
) -> Choice:  # fmt: skip
    """Pick a method for a pair of backbones.

    Args:
        upgrade_map: The map of the pair.
        can_run: Whether both backbones can be run without a download that the upgrade does not need anyway.
        task: Task of the adapter; a classifier is fitted to unlabeled texts or transferred by weights.
        prompts: The prompts as they were read, their name, or None.
        same: The comparison of the weights; by default that of the map alone.
    """
    same = same or compare_pair(upgrade_map, None, None)
    given = () if prompts is None or isinstance(prompts, str) else prompts
    talks = not task.classifies and any(isinstance(one, Conversation) for one in given)
    if same.same:
        unread = f"; not compared: {', '.join(same.unread)}" if same.unread else ""
        return Choice("rekey", f"both backbones hold the same weights (equal {', '.join(same.equal)}{unread})")
    if not upgrade_map.maps_weights:
        return _pick_by_behavior(upgrade_map, talks=talks)
    share = explained_share(upgrade_map)
    if is_continued_training(upgrade_map):
        return Choice("copy", "embeddings and heads of both backbones are nearly the same (continued training)")
    if share >= MIN_EXPLAINED:
        return Choice(
            "lorasuite", f"the maps explain {share:.0%} of the new heads' weights, so weights can be transferred"
        )
    low = f"the maps explain only {share:.0%} of the new heads' weights"
    if task.classifies and not given:
        return Choice("lorasuite", f"no texts were given (prompts=, --prompts), which 'transplant' needs; {low}")
    if task.kind == "FEATURE_EXTRACTION":
        return Choice("lorasuite", f"embedding models are transferred by weights; {low}")
    if can_run and upgrade_map.new.arch.experts:
        return Choice("distill", f"{low}, both backbones can be run, and 'transplant' has no place in experts")
    if can_run and talks:
        return Choice("distill", f"{low}, both backbones can be run, and the prompts are conversations")
    if can_run:
        return Choice("transplant", f"{low}, and both backbones can be run")
    return Choice(
        "lorasuite",
        f"the old backbone was not passed; {low}, and "
        f"method='transplant' would recover more, at the cost of {_transplant_cost(upgrade_map)}",
    )


def _pick_by_behavior(upgrade_map: UpgradeMap, *, talks: bool) -> Choice:
    """Pick a method for a pair of which a backbone has no converter; all others need the map of the weights."""
    names = " and ".join(map(repr, upgrade_map.without_converter))
    have = "has" if len(upgrade_map.without_converter) == 1 else "have"
    reason = f"{names} {have} no converter, so weights cannot be mapped"
    if talks:
        return Choice("distill", f"{reason}, and the prompts are conversations")
    if upgrade_map.new.arch.has_converter and not upgrade_map.new.arch.experts:
        return Choice("transplant", f"{reason}, and the last layer of the new backbone is known")
    return Choice("distill", f"{reason}, and the new backbone may have no place for a transplant")


def check_method(chosen: Method, upgrade_map: UpgradeMap) -> dict[str, Any]:
    """Return for the report which model types of the pair have no converter.

    Raises:
        LoraSuiteError: If one has none, and the method transfers weights.
    """
    missing = upgrade_map.without_converter
    if missing and not chosen.needs_backbones:
        raise LoraSuiteError(
            f"the method {chosen.name!r} transfers weights and needs a converter for both backbones",
            where=" and ".join(map(repr, missing)), got="none",
            do="use 'distill' or 'transplant', which run the models, or add a converter (docs/add-a-family.md)",
        )  # fmt: skip
    return {"without_converter": missing} if missing else {}


def _transplant_cost(upgrade_map: UpgradeMap) -> str:
    """Describe what running both backbones takes, at two bytes per parameter."""
    old, new = (2 * identity.arch.parameter_count() for identity in (upgrade_map.old, upgrade_map.new))
    return (
        f"downloading the old backbone ({_format_bytes(old)}), loading it and then the new one "
        f"({_format_bytes(new)}), and a few passes of each over the prompts"
    )


def _format_bytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
