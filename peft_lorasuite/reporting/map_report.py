"""The HTML report of an upgrade map: prediction, layers, heads, hidden map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..arch.differences import differences
from ..mapping.upgrade_map import UpgradeMap
from ..upgrading import auto, prediction
from . import html, map_figures
from .adapter_figures import gap_figure
from .gap import Result, measure_gap
from .html import ReportContents, Section
from .style import shorten

METHODS = ("lorasuite", "transplant", "distill")
"""Methods of the table of predictions: one that converts weights, two that read the adapter's behavior."""

CONVERSATIONS = "If weights would not do and the prompts are conversations, it picks distill."


def map_page(upgrade_map: UpgradeMap, results: Sequence[Result], contents: ReportContents) -> str:
    """Return the HTML report of a map."""
    old, new = shorten(upgrade_map.old.name, 60), shorten(upgrade_map.new.name, 60)
    sections = [*map_sections(upgrade_map, contents), gap_section(results, contents), _provenance_section(upgrade_map)]
    about = "Upgrade map: how the layers, heads and hidden dimensions of two backbones correspond."
    head = map_verdict(upgrade_map, "lorasuite" if upgrade_map.maps_weights else "distill")
    return html.page(f"{old} to {new}", about, [head], sections)


HEADLINES = {
    "holds": "Likely to hold.",
    "doubtful": "Doubtful: compare the new adapter with the old one on your own data.",
    "retrain": "Unlikely to hold: plan to retrain.",
}
"""Verdict -> what the report says."""


def map_verdict(upgrade_map: UpgradeMap, method: str) -> str:
    """Return the predicted outcome of an upgrade by a method, and what the prediction is based on."""
    found = prediction.predict(upgrade_map, method)
    expected = f"Expected with {method}: {found.gap:.0%} of the gap recovered, a rough estimate."
    return html.verdict(HEADLINES[found.verdict], f"{expected} Based on: {found.because}.")


def map_sections(upgrade_map: UpgradeMap, contents: ReportContents, *, methods: bool = True) -> list[Section]:
    """Return the sections with a map's figures; a map of backbones without converters has none.

    Args:
        upgrade_map: The map.
        contents: Records which figures are shown.
        methods: Whether to predict what methods would do: of a result it is known what was done.
    """
    if not upgrade_map.maps_weights:
        choice = auto.pick(upgrade_map, can_run=True)
        return [
            Section("Prediction", [html.paragraph(f"Without prompts, auto picks {choice.method}: {choice.reason}.")])
        ]
    return [
        _prediction_section(upgrade_map, contents, methods=methods),
        _layers_section(upgrade_map, contents),
        _heads_section(upgrade_map, contents),
        _hidden_section(upgrade_map, contents),
    ]


def _prediction_section(upgrade_map: UpgradeMap, contents: ReportContents, *, methods: bool) -> Section:
    caption = "Scores of this pair, and the thresholds (vertical marks) above which it counts as aligned."
    figure = contents.add_figure("prediction", lambda: map_figures.prediction_figure(upgrade_map), caption)
    if not methods:
        return Section("Scores of the pair", [figure])
    choice = auto.pick(upgrade_map, can_run=True)
    picked = f"With both backbones available, auto picks {choice.method}: {choice.reason}. {CONVERSATIONS}"
    found = {name: prediction.predict(upgrade_map, name) for name in METHODS}
    lines = [(name, one.verdict, f"{one.gap:.0%}") for name, one in found.items()]
    return Section(
        "Prediction",
        [
            figure,
            html.table(("method", "verdict", "gap expected"), lines, "Predicted from the map alone, before any run."),
            html.paragraph(picked),
        ],
    )


def _layers_section(upgrade_map: UpgradeMap, contents: ReportContents) -> Section:
    caption = (
        "Similarity of the outputs of old and new layers on the same text, and the old layer that each new layer is "
        "matched with. A new layer without a point has no match: nothing is transferred to it."
    )
    unmatched = sorted(set(range(upgrade_map.new.arch.layers)) - {new for _, new in upgrade_map.pairs})
    text = "Every new layer is matched."
    if unmatched:
        text = f"New layers without a matching old layer: {', '.join(map(str, unmatched))}."
    figure = contents.add_figure("layers", lambda: map_figures.layer_map_figure(upgrade_map), caption)
    return Section("Layers", [figure, html.paragraph(text)])


def _heads_section(upgrade_map: UpgradeMap, contents: ReportContents) -> Section:
    assignment = (
        "Each cell is a query head of the new backbone. Its number is the old head that it is matched with, its color "
        "their similarity. Key and value heads follow the query heads of their group."
    )
    heads = map_figures.has_heads(upgrade_map)
    explained = "How much of the new backbone's weights the fitted maps of heads and feed-forward units explain."
    return Section(
        "Heads and units",
        [
            *(
                [contents.add_figure("heads", lambda: map_figures.heads_figure(upgrade_map), assignment)]
                if heads
                else []
            ),
            contents.add_figure("explained", lambda: map_figures.residual_figure(upgrade_map), explained),
        ],
    )


def _hidden_section(upgrade_map: UpgradeMap, contents: ReportContents) -> Section:
    caption = (
        "The hidden map takes embeddings of the old backbone to the space of the new one. A shared token is nearest to "
        "itself if no other new embedding has a higher cosine with its mapped embedding than its own."
    )
    figure = contents.add_figure("hidden", lambda: map_figures.hidden_figure(upgrade_map), caption)
    return Section("Hidden map", [figure])


def gap_section(results: Sequence[Result], contents: ReportContents) -> Section:
    """Return the section with the measured results, or with how to get it."""
    title = "Gap recovered"
    if not results:
        reason = "no measured results were given (--rows DIR, as evaluate -o DIR or benchmarks/gap.py write them)"
        return Section(title, [contents.add_missing("gap", reason)])
    gap = measure_gap(results)
    shares = gap.shares if gap else [None] * len(results)
    lines = [
        (row.label, "-" if share is None else f"{share:.0%}", f"{row.accuracy:.1%}", f"{row.interval[0]:.1%} to "
         f"{row.interval[1]:.1%}", "-" if row.nll is None else f"{row.nll:.3f}", row.items,
         "-" if row.seconds is None else f"{row.seconds:.0f}")
        for row, share in zip(results, shares, strict=True)
    ]  # fmt: skip
    head = ("result", "gap recovered", "accuracy", "95 % interval", "nats per token", "items", "seconds")
    if gap:
        metric = "the answers' likelihood" if gap.metric == "nll" else "accuracy"
        caption = f"Measured in {metric}: 0 % is the new backbone alone, 100 % the result {shorten(gap.ceiling)}."
    else:
        caption = "No gap: it needs a result 'base' and a result 'full' (or 'old-adapted') that is clearly better."
    caption += " Hatched bars were trained on labels."
    drawn = [contents.add_figure("gap", lambda: gap_figure(results), caption)] if len(results) > 1 else []
    return Section(title, [*drawn, html.table(head, lines)])


def _provenance_section(upgrade_map: UpgradeMap) -> Section:
    old, new = upgrade_map.old, upgrade_map.new
    values: dict[str, Any] = {
        "old backbone": _describe_backbone(old),
        "new backbone": _describe_backbone(new),
        "options": ", ".join(f"{name} {value}" for name, value in vars(upgrade_map.options).items()),
        "matched layers": f"{len(upgrade_map.layers)} of {old.arch.layers} old and {new.arch.layers} new",
        "shared tokens": f"{upgrade_map.facts.get('shared_tokens', 0):,}",
        "sections for methods": ", ".join(upgrade_map.sections) or "none",
    }
    seconds = upgrade_map.facts.get("seconds") or {}
    values |= {f"seconds, {name}": value for name, value in seconds.items()}
    compared = [differences_table(differences(old.arch, new.arch))] if upgrade_map.maps_weights else []
    return Section("How it was made", [html.name_value_table(values), *compared])


def _describe_backbone(identity: Any) -> str:
    arch = identity.arch
    revision = f" at {identity.revision[:12]}" if identity.revision else ""
    kinds = dict.fromkeys(arch.in_layer(layer).heads for layer in range(arch.layers))
    heads = ", or ".join(f"{one.query} query and {one.key_value} key/value heads of {one.size}" for one in kinds)
    layers = heads if arch.has_converter else "no converter"
    return (
        f"{shorten(identity.name, 80)}{revision} ({arch.family}, {arch.layers} layers, hidden size {arch.hidden}, "
        f"{layers})"
    )


def differences_table(sentences: Sequence[str]) -> str:
    """Return the structural differences of two backbones, and how an upgrade handles each."""
    if not sentences:
        return html.paragraph("Apart from their sizes, the two architectures do not differ.")
    head = ("Differences of the two architectures, and how each is handled",)
    return html.table(head, [(sentence,) for sentence in sentences])
