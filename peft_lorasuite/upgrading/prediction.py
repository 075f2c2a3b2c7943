"""Prediction whether an upgrade is likely to hold, from the map and, once the method has run, from its own fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..mapping.upgrade_map import UpgradeMap

MAX_DISTANCE = 0.1
"""Relative distance of the embeddings, token by token, up to which the new backbone counts as the old one after more
training."""
MIN_EXPLAINED = 0.5
"""Share of the new weights explained by the maps, above which weights can be transferred."""
MIN_AGREEMENT = 0.03
"""Agreement on held-out tokens (`Scores`) below which the vocabularies do not align. Independently trained backbones
reach .05 (the demo pair) and more, random embeddings chance level."""
MIN_HITS = 6
"""The same as a number of tokens, for small vocabularies: by chance one token agrees, six hardly ever do."""
MIN_FITTED_AGREEMENT = 0.5
"""Agreement on the tokens of the fit itself below which the vocabularies do not align, for maps without held-out
tokens."""
MIN_CKA = 0.3
"""Mean CKA of the matched layers below which the backbones do not align. A random backbone has about .2, since it
distinguishes the same tokens; independently trained ones have .6 and more."""
FULL_CONFIDENCE = 0.5
"""Mean confidence of the old adapted model on the prompts above which the expected gap is not reduced."""
MIN_CONFIDENCE = 0.7
"""Mean confidence of the old adapted model on the prompts below which the verdict is doubtful. Built-in prompts reach
.45 to .62 on adapters of another prompt format, recovered or not; prompts of the task reach .85 and more."""
MIN_EQUAL = 0.6
"""Share of the sample answers that the adapter changed and the result gives as well, below which the verdict is
doubtful. The likelihood of an answer can rise far while another answer stays the likeliest. Upgrades of conversations
that hold reach .6 and more; two with .38 and .49 of their test answers right reached .2 and .5."""
MIN_KEPT = 0.8
"""Share of the answers that the adapter decides in full (`Probe.answers_kept`) from which the sample answers count.
Where the adapter decides the form of an answer and leaves its content to the model, that of the new model is wanted."""
MIN_COVERAGE = 0.95
"""Share of the adapter's tensors that were transferred below which the verdict is doubtful."""
MIN_SAMPLES = 5
"""Changed sample answers from which they count."""
SHORT_ANSWER = 8
"""Words of a sample answer on average up to which the same answer is expected; longer ones differ in their wording."""
DISTILL_HINT = "; method='distill' can recover more from the same prompts"
EXPECTED_GAP = {"transplant": 0.7, "distill": 0.9}
"""Methods that transfer the adapter's behavior -> gap expected before they have run."""


@dataclass(frozen=True)
class Scores:
    """Scores of a map, each from 0 to 1.

    Attributes:
        agreement: Share of shared tokens whose mapped embedding is nearest to their own new embedding.
        least: Threshold of ``agreement``.
        explained: Mean share of the new heads' weights that the head maps explain.
        alike: Mean CKA of the matched layers; None if the layer map did not use it.
        near: Similarity of the embeddings, token by token, if all sizes are equal and heads and units are matched in
            place; 0 otherwise. The gap expected of `copy`.
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
        verdict: ``"holds"``, ``"doubtful"`` (the old adapted model was uncertain of its answers, as with prompts of
            another format than it was trained on, or the result answers differently) or ``"retrain"``.
        gap: Share of the adapter's gain that is expected to be recovered, from 0 to 1; a rough estimate.
        because: The scores that this is based on.
        answers: How many sample answers are the old adapted model's, and how many the adapter changed; see
            `equal_answers`.
    """

    verdict: str
    gap: float
    because: str
    answers: tuple[int, int] | None = None


def explained_share(upgrade_map: UpgradeMap) -> float:
    """Return the mean share of the new heads' weights that the head maps explain: ``1 - residual^2``, from 0 to 1."""
    fits = [fit for pair in upgrade_map.layers for fit in pair.head_fits.values()]
    shares = [float((1 - fit.residual.clamp(max=1) ** 2).mean()) for fit in fits]
    return sum(shares) / len(shares) if shares else 0.0


def mean_cka(upgrade_map: UpgradeMap) -> float | None:
    """Return the mean CKA of the matched layers; None if the layer map did not use it."""
    values = [float(upgrade_map.similarity[i, j]) for i, j in upgrade_map.pairs]
    return sum(values) / len(values) if any(values) and upgrade_map.options.similarity == "cka" else None


def agreement(upgrade_map: UpgradeMap) -> tuple[float, float]:
    """Return the share of shared tokens that are nearest to themselves in the hidden map, and its threshold."""
    hidden = upgrade_map.facts.get("hidden", {})
    tokens = upgrade_map.facts.get("shared_tokens", 0) // 2
    if hidden.get("held_out") is not None:
        return float(hidden["held_out"]), max(MIN_AGREEMENT, MIN_HITS / max(tokens, MIN_HITS))
    return float(hidden.get("agreement", 0.0)), MIN_FITTED_AGREEMENT


def scores(upgrade_map: UpgradeMap) -> Scores:
    """Return the scores of a map."""
    return Scores(
        *agreement(upgrade_map),
        explained=explained_share(upgrade_map),
        alike=mean_cka(upgrade_map),
        near=embedding_similarity(upgrade_map),
    )


def embedding_similarity(upgrade_map: UpgradeMap) -> float:
    """Return 1 minus the relative distance of the embeddings if everything is matched in place; 0 otherwise."""
    distance = upgrade_map.facts.get("hidden", {}).get("distance")
    if (
        distance is None
        or upgrade_map.old.arch.sizes() != upgrade_map.new.arch.sizes()
        or not _is_in_place(upgrade_map)
    ):
        return 0.0
    return max(1.0 - float(distance), 0.0)


def _is_in_place(upgrade_map: UpgradeMap) -> bool:
    """Whether every head and nearly every unit is matched with the one of the same index."""
    pairs = upgrade_map.layers
    heads = all(bool((pair.heads[:, 0] == pair.heads[:, 1]).all()) for pair in pairs)
    units = [float((pair.units[:, 0] == pair.units[:, 1]).float().mean()) for pair in pairs if len(pair.units)]
    return heads and all(share >= 1 - MAX_DISTANCE for share in units)


def predict(upgrade_map: UpgradeMap, method: str, fitted: Mapping[str, Any] | None = None) -> Prediction:
    """Predict whether an upgrade by a method will hold.

    Args:
        upgrade_map: The map of the pair.
        method: Name of the method.
        fitted: Facts that the method reported (``report.facts``), once it has run.
    """
    return judge(scores(upgrade_map) if upgrade_map.maps_weights else None, method, fitted)


def judge(map_scores: Scores | None, method: str, fitted: Mapping[str, Any] | None = None) -> Prediction:
    """Predict from the scores of a map, or from the method's own fit alone if there are none; see `predict`."""
    measured = (fitted or {}).get(method, {})
    if "agreement" in measured:
        return _judge_classifier(measured)
    if map_scores is None:
        return _judge_fit("no map of the weights: a backbone has no converter", 0.0, method, fitted or {})
    because = f"shared tokens nearest to themselves {map_scores.agreement:.0%} (at least {map_scores.least:.0%})"
    because += f", new heads' weights explained {map_scores.explained:.0%}"
    because += (
        ""
        if map_scores.alike is None
        else f", similarity of matched layers {map_scores.alike:.2f} (at least {MIN_CKA})"
    )
    if map_scores.agreement < map_scores.least or (map_scores.alike is not None and map_scores.alike < MIN_CKA):
        return Prediction("retrain", 0.0, because)
    gap = map_scores.near if method == "copy" else map_scores.explained
    because += f", similarity of the embeddings {map_scores.near:.0%}" if method == "copy" else ""
    return _judge_fit(because, gap, method, fitted or {})


def equal_answers(samples: Sequence[Mapping[str, str]]) -> tuple[int, int] | None:
    """Return how many sample answers the result gives as the old adapted model did, and how many the adapter changed.

    None if the adapter changed too few, or they are long. One of two answers may be cut.
    """
    changed = [one for one in samples if one["old"] and one["old"] != one["base"]]
    words = sum(len(one["old"].split()) for one in changed)
    if len(changed) < MIN_SAMPLES or words > SHORT_ANSWER * len(changed):
        return None
    pairs = [(one["old"], one["upgraded"]) for one in changed]
    return sum(bool(got) and (got.startswith(old) or old.startswith(got)) for old, got in pairs), len(changed)


def _judge_answers(found: Prediction, method: str, fitted: Mapping[str, Any]) -> Prediction:
    """Make a verdict doubtful if the result gives too few of the old adapted model's short answers.

    They do not count where the adapter leaves the content of most answers to the new model.
    """
    counts = equal_answers(fitted.get("samples", []))
    if counts is None:
        return found
    kept = float(fitted.get(method, {}).get("answers_kept", 1.0))
    if kept < MIN_KEPT:
        return replace(found, because=f"{found.because}, answers that the adapter decides in full {kept:.0%}")
    equal, changed = counts
    because = f"{found.because}, {equal} of {changed} changed sample answers as the old adapted model's"
    because += " on prompts left out of the fit" if fitted.get("samples_held_out") else ""
    found = replace(found, because=because, answers=counts)
    if found.verdict != "holds" or equal >= MIN_EQUAL * changed:
        return found
    because += DISTILL_HINT if method == "transplant" else ""
    return replace(found, verdict="doubtful", because=because)


def _judge_fit(because: str, gap: float, method: str, fitted: Mapping[str, Any]) -> Prediction:
    """Predict from what the method measured; ``gap`` is that of methods that transfer weights."""
    measured, confidence = fitted.get(method, {}), 1.0
    if method in EXPECTED_GAP:
        gap = EXPECTED_GAP[method]
        if "divergence" in measured:
            before, left = float(measured["divergence"]), float(measured["divergence_left"])
            gap = max(1 - left / before, 0.0) if before > 0 else 0.0
            because += f", target reached on the prompts {gap:.0%}"
        if "confidence" in measured:
            confidence = float(measured["confidence"])
            gap *= min(1.0, confidence / FULL_CONFIDENCE)
            because += f", confidence of the old adapted model {confidence:.2f}"
        if method == "transplant" and gap < MIN_EXPLAINED:
            because += DISTILL_HINT
    start = measured.get("transplant", {})  # distillation starts from it
    confidence = min(confidence, float(start.get("confidence", 1.0)))
    verdict = "retrain" if gap < MIN_EXPLAINED else "doubtful" if confidence < MIN_CONFIDENCE else "holds"
    return _judge_answers(Prediction(verdict, round(gap, 3), because), method, fitted)


def _judge_classifier(measured: Mapping[str, Any]) -> Prediction:
    """Predict from how a classifier agrees with the old one on texts that its fit left out; the map plays no part."""
    before, left = float(measured["divergence"]), float(measured["divergence_left"])
    gap = max(1 - left / before, 0.0) if before > 0 else 0.0
    because = f"agreement with the old classifier on texts left out of the fit {float(measured['agreement']):.0%}"
    because += f", its outputs reached {gap:.0%}"
    return Prediction("holds" if gap >= MIN_EXPLAINED else "retrain", round(gap, 3), because)


def with_coverage(found: Mapping[str, Any], covered: float | None) -> dict[str, Any]:
    """Return the prediction as JSON values, doubtful if too few of the adapter's tensors were transferred.

    Args:
        found: The prediction.
        covered: The share, None where the behavior was transferred.
    """
    if covered is None or covered >= MIN_COVERAGE:
        return dict(found)
    verdict = "doubtful" if found["verdict"] == "holds" else found["verdict"]
    return {**found, "verdict": verdict, "because": f"{found['because']}, tensors transferred {covered:.0%}"}


def facts(upgrade_map: UpgradeMap, method: str, fitted: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the prediction as JSON values for the report; see `predict`."""
    predicted = predict(upgrade_map, method, fitted)
    found = {"verdict": predicted.verdict, "expected_gap_recovered": predicted.gap, "because": predicted.because}
    return found if predicted.answers is None else found | {"equal_answers": list(predicted.answers)}
