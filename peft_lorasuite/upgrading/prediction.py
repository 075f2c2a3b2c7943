"""Whether an upgrade is likely to hold: predicted from the map, and from the method's own fit once it has run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..mapping.upgrade_map import UpgradeMap

NEAR = 0.1
"""Relative distance of the embeddings, token by token, below which two backbones are one lineage."""
EXPLAINED = 0.5
"""Share of the new weights that the maps explain, from which on weights can be transferred."""
AGREEMENT = 0.03
"""Share of shared tokens, left out of the fit, that find themselves through the hidden map, below which the
vocabularies do not align. Backbones trained apart reach .05 (the demo pair) and more, random embeddings chance."""
HITS = 6
"""The same as a number of tokens, for small vocabularies: by chance one token finds itself, six hardly ever do."""
FITTED_AGREEMENT = 0.5
"""The same share on the tokens of the fit itself, for maps that know no other."""
ALIKE = 0.3
"""Mean CKA of the matched layers below which the backbones do not see a text alike: a random one has about .2, for it
tells the same words apart; backbones trained apart have .6 and more."""
CONFIDENT = 0.5
"""Mean confidence of the old adapted model on the prompts from which on nothing is missing for want of it."""
BEHAVIOR = {"transplant": 0.7, "distill": 0.9}
"""Methods that transfer what the adapter does, not its weights -> what is expected before anything is read."""


@dataclass(frozen=True)
class Scores:
    """What the gate looks at, each from 0 to 1.

    Attributes:
        agreement: Share of shared tokens that find themselves through the hidden map.
        least: What it must reach.
        explained: Mean share of the new heads' weights that the head maps explain.
        alike: Mean CKA of the matched layers; None where the layer map did not look at it.
        near: One less the relative distance of the embeddings, token by token, where heads and units are in place and
            all sizes are equal; else 0. What is expected of `copy`.
    """

    agreement: float
    least: float
    explained: float
    alike: float | None
    near: float = 0.0


@dataclass(frozen=True)
class Prediction:
    """Whether an upgrade by a method is likely to hold.

    Attributes:
        verdict: ``"holds"`` or ``"retrain"``.
        gap: Share of the adapter's gain that is expected to arrive, from 0 to 1; a rough guess.
        because: The scores that it rests on.
    """

    verdict: str
    gap: float
    because: str


def explained(upgrade_map: UpgradeMap) -> float:
    """Mean share of the new heads' weights that the head maps explain: ``1 - residual^2``, from 0 to 1."""
    fits = [fit for pair in upgrade_map.layers for fit in pair.head_fits.values()]
    shares = [float((1 - fit.residual.clamp(max=1) ** 2).mean()) for fit in fits]
    return sum(shares) / len(shares) if shares else 0.0


def alike(upgrade_map: UpgradeMap) -> float | None:
    """Mean CKA of the matched layers; None where the layer map looked at nothing, or at what is no CKA."""
    values = [float(upgrade_map.similarity[i, j]) for i, j in upgrade_map.pairs]
    return sum(values) / len(values) if any(values) and upgrade_map.options.similarity == "cka" else None


def agreement(upgrade_map: UpgradeMap) -> tuple[float, float]:
    """Share of the shared tokens that find themselves through the hidden map, and what it must reach."""
    hidden = upgrade_map.facts.get("hidden", {})
    tokens = upgrade_map.facts.get("shared_tokens", 0) // 2
    if hidden.get("held_out") is not None:
        return float(hidden["held_out"]), max(AGREEMENT, HITS / max(tokens, HITS))
    return float(hidden.get("agreement", 0.0)), FITTED_AGREEMENT


def scores(upgrade_map: UpgradeMap) -> Scores:
    """Read off a map what the gate looks at."""
    return Scores(*agreement(upgrade_map), explained(upgrade_map), alike(upgrade_map), near(upgrade_map))


def near(upgrade_map: UpgradeMap) -> float:
    """One less the distance of the embeddings where everything is in place, else 0."""
    distance = upgrade_map.facts.get("hidden", {}).get("distance")
    if distance is None or upgrade_map.old.arch.sizes() != upgrade_map.new.arch.sizes() or not _in_place(upgrade_map):
        return 0.0
    return max(1.0 - float(distance), 0.0)


def _in_place(upgrade_map: UpgradeMap) -> bool:
    """Whether every head and nearly every unit is matched with the one of its own number."""
    pairs = upgrade_map.layers
    heads = all(bool((pair.heads[:, 0] == pair.heads[:, 1]).all()) for pair in pairs)
    units = [float((pair.units[:, 0] == pair.units[:, 1]).float().mean()) for pair in pairs if len(pair.units)]
    return heads and all(share >= 1 - NEAR for share in units)


def predict(upgrade_map: UpgradeMap, method: str, fitted: Mapping[str, Any] | None = None) -> Prediction:
    """Predict whether an upgrade by a method will hold.

    Args:
        upgrade_map: The pair's map.
        method: The method.
        fitted: What the method measured (``report.facts``), once it has run.
    """
    return judge(scores(upgrade_map), method, fitted)


def judge(found: Scores, method: str, fitted: Mapping[str, Any] | None = None) -> Prediction:
    """Predict from the scores alone; see `predict`."""
    because = f"shared tokens found through the hidden map {found.agreement:.0%} (at least {found.least:.0%})"
    because += f", new heads' weights explained {found.explained:.0%}"
    because += "" if found.alike is None else f", similarity of matched layers {found.alike:.2f} (at least {ALIKE})"
    if found.agreement < found.least or (found.alike is not None and found.alike < ALIKE):
        return Prediction("retrain", 0.0, because)
    gap = found.near if method == "copy" else found.explained
    because += f", embeddings alike token by token {found.near:.0%}" if method == "copy" else ""
    if method in BEHAVIOR:
        gap, info = BEHAVIOR[method], (fitted or {}).get(method, {})
        if "divergence" in info:
            before, left = float(info["divergence"]), float(info["divergence_left"])
            gap = max(1 - left / before, 0.0) if before > 0 else 0.0
            because += f", wanted change reached on the prompts {gap:.0%}"
        if "confidence" in info:
            sure = float(info["confidence"])
            gap *= min(1.0, sure / CONFIDENT)
            because += f", confidence of the old adapted model {sure:.2f}"
        if method == "transplant" and gap < EXPLAINED:
            because += "; method='distill' trains on the same prompts what is missing"
    return Prediction("holds" if gap >= EXPLAINED else "retrain", round(gap, 3), because)


def facts(upgrade_map: UpgradeMap, method: str, fitted: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the prediction as JSON values for the report."""
    found = predict(upgrade_map, method, fitted)
    return {"verdict": found.verdict, "expected_gap_recovered": found.gap, "because": found.because}
