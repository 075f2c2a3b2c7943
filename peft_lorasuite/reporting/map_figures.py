"""Figures of an upgrade map: layers, heads, hidden map, scores of the prediction. Needs the extra ``report``."""

from __future__ import annotations

import math
from itertools import product
from typing import TYPE_CHECKING, Any

from ..mapping.upgrade_map import UpgradeMap
from ..upgrading import prediction
from .style import (
    ACCENT,
    COLORMAP,
    FILL,
    HATCHES,
    INK,
    LINE_STYLES,
    MARKERS,
    PAPER,
    new_figure,
    text_colors,
    ticks,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_NUMBERED_HEADS = 40
"""Heads of a layer up to which each cell of the head map shows its old head; more would be unreadable."""


def layer_map_figure(upgrade_map: UpgradeMap) -> Figure:
    """Draw the similarity of all pairs of layers as a heat map, new layers across and old ones down, and the layer map.

    Returns:
        A figure without a window; ``figure.savefig("map.png")`` writes it.

    Raises:
        LoraSuiteError: If matplotlib is not installed.
    """
    from matplotlib import patheffects

    rows, columns = upgrade_map.similarity.shape
    name = upgrade_map.options.similarity.upper()
    measured = bool(upgrade_map.similarity.any())
    with new_figure(3.2 + 0.28 * max(columns, 10), 1.6 + 0.28 * max(rows, 6)) as figure:
        axes = figure.add_subplot()
        if measured:
            values = upgrade_map.similarity.numpy()
            image = axes.imshow(values, cmap=COLORMAP, vmin=0, vmax=1, aspect="auto", interpolation="none")
            figure.colorbar(image, label=f"{name} of the outputs (0 to 1)")
        old, new = zip(*upgrade_map.pairs, strict=True)
        (line,) = axes.plot(
            new, old, color="white", marker="o", markeredgecolor="black", markersize=6, linewidth=1.6,
            label="layer map",
        )  # fmt: skip
        line.set_path_effects([patheffects.Stroke(linewidth=3.6, foreground="black"), patheffects.Normal()])
        axes.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5), xticks=ticks(columns), yticks=ticks(rows))
        axes.set_xlabel(f"layer of the new backbone ({upgrade_map.new.arch.family}, {columns} layers)")
        axes.set_ylabel(f"layer of the old backbone\n({upgrade_map.old.arch.family}, {rows} layers)")
        axes.set_title(_layer_title(upgrade_map, name))
        axes.legend(loc="upper right", framealpha=1.0, facecolor="#4a4a4a", labelcolor="white")
    return figure


def _layer_title(upgrade_map: UpgradeMap, name: str) -> str:
    how = upgrade_map.options.layer_map
    return f"{name} and the best ordered path" if how == "cka" else f"Layer map {how!r}: similarity not measured"


def has_heads(upgrade_map: UpgradeMap) -> bool:
    """Whether any heads are matched: a hybrid's layers of attention can all be matched with others."""
    return any(len(pair.heads) for pair in upgrade_map.layers)


def heads_figure(upgrade_map: UpgradeMap) -> Figure:
    """Draw which old query head each new one is matched with, and how similar they are.

    Each cell is a head of the new backbone; its number is the old head, its color the cosine of both heads'
    interaction matrices. Beside it, the mean, minimum and maximum of each layer.
    """
    import numpy as np

    pairs = [pair for pair in upgrade_map.layers if len(pair.heads)]
    arch = upgrade_map.new.arch
    rows, columns = len(pairs), max(arch.in_layer(pair.new).heads.query for pair in pairs)
    scores = np.full((rows, columns), np.nan)
    old_heads = np.full((rows, columns), -1)
    for row, pair in enumerate(pairs):
        scores[row, pair.heads[:, 1].numpy()] = pair.head_scores.numpy()
        old_heads[row, pair.heads[:, 1].numpy()] = pair.heads[:, 0].numpy()
    top = max(0.1, math.ceil(10 * float(np.nanmax(scores))) / 10)  # unrelated backbones are far below 1
    with new_figure(4.8 + 0.26 * max(columns, 12), 1.7 + 0.24 * max(rows, 6)) as figure:
        cells, summary = figure.subplots(1, 2, sharey=True, width_ratios=[max(columns, 12), 9])
        image = cells.imshow(scores, cmap=COLORMAP, vmin=0, vmax=top, aspect="auto", interpolation="none")
        figure.colorbar(image, ax=cells, label="cosine of both heads (at most 1)")
        _number_cells(cells, scores / top, old_heads)
        cells.set(xticks=ticks(columns), yticks=range(rows), yticklabels=[pair.new for pair in pairs])
        cells.set_xlabel("query head of the new backbone\n(in the cell: the old head; -: none)")
        cells.set_ylabel("layer of the new backbone")
        cells.set_title("Assignment of heads")
        _draw_layer_means(summary, scores, top)
    return figure


def _number_cells(axes: Any, scores: Any, old_heads: Any) -> None:
    """Write the old head's index into every cell.

    Args:
        axes: The heat map.
        scores: Color of each cell, from 0 to 1, (layers, heads).
        old_heads: Index of the old head, -1 for none, (layers, heads).
    """
    if scores.shape[1] > MOST_NUMBERED_HEADS:
        return
    colors = text_colors(scores)
    for row, column in product(*map(range, old_heads.shape)):
        old = old_heads[row, column]
        text, color = (str(old), colors[row, column]) if old >= 0 else ("-", INK)
        axes.text(column, row, text, color=color, ha="center", va="center", fontsize=7)


def _draw_layer_means(axes: Any, scores: Any, top: float) -> None:
    """Draw each layer's mean cosine, and its range."""
    import numpy as np

    mean = np.nanmean(scores, axis=1)
    spread = np.stack([mean - np.nanmin(scores, axis=1), np.nanmax(scores, axis=1) - mean]).clip(min=0)
    axes.errorbar(
        mean, range(len(mean)), xerr=spread, fmt="D", color=INK, ecolor=ACCENT, capsize=2, markersize=4, linestyle="-",
    )  # fmt: skip
    axes.set_xlim(min(0.0, 1.05 * float(np.nanmin(scores))), 1.02 * top)
    axes.set_xlabel("cosine\n(mean, min to max)")
    axes.set_title("Per layer")
    axes.grid(axis="x", color=INK, alpha=0.25)


def hidden_figure(upgrade_map: UpgradeMap) -> Figure:
    """Draw the quality of the hidden map on the shared tokens, in percent."""
    facts = upgrade_map.facts.get("hidden", {})
    names = {
        "agreement": "shared tokens that are nearest\nto themselves (higher is better)",
        "held_out": "the same, on tokens\nheld out from the fit",
        "error": "error of the mapped embeddings,\nrelative to the new (lower is better)",
        "distance": "distance of the embeddings\nwithout any map",
    }
    values = {label: 100 * float(facts[name]) for name, label in names.items() if facts.get(name) is not None}
    with new_figure(7.2, 1.3 + 0.55 * max(len(values), 1)) as figure:
        axes = figure.add_subplot()
        _draw_bars(axes, values, unit="%", top=max([100.0, *values.values()]))
        axes.set_xlabel("percent")
        axes.set_title(f"Hidden map on {upgrade_map.facts.get('shared_tokens', 0):,} shared tokens")
    return figure


def prediction_figure(upgrade_map: UpgradeMap) -> Figure:
    """Draw the scores that the prediction is based on, each with its threshold."""
    explained = prediction.explained_share(upgrade_map)
    rows = {
        "shared tokens nearest to\nthemselves in the hidden map": prediction.agreement(upgrade_map),
        "new heads' weights\nexplained by the maps": (explained, prediction.MIN_EXPLAINED),
    }
    similarity = prediction.mean_cka(upgrade_map)
    if similarity is not None:
        rows["similarity of\nthe matched layers"] = (similarity, prediction.MIN_CKA)
    with new_figure(7.2, 1.4 + 0.55 * len(rows)) as figure:
        axes = figure.add_subplot()
        _draw_bars(axes, {name: value for name, (value, _) in rows.items()}, unit="", top=1.0)
        thresholds = [threshold for _, threshold in rows.values()]
        axes.plot(
            thresholds, range(len(thresholds)), linestyle="none", marker="|", markersize=26, markeredgewidth=2.5,
            color=ACCENT, label="threshold",
        )  # fmt: skip
        axes.set_xlabel("score (share or similarity, 0 to 1)")
        axes.set_title("Scores of the prediction")
        figure.legend(loc="outside lower right", frameon=False, markerscale=0.5)
    return figure


def _draw_bars(axes: Any, values: dict[str, float], *, unit: str, top: float) -> None:
    """Draw horizontal bars, each with its value at the end."""
    bars = axes.barh(list(values), list(values.values()), color=FILL, edgecolor=INK, height=0.6)
    for bar, hatch in zip(bars, HATCHES, strict=False):
        bar.set_hatch(hatch)
    texts = [f"{value:.1f} %" if unit else f"{value:.2f}" for value in values.values()]
    axes.bar_label(bars, texts, padding=4, bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1.0})
    axes.invert_yaxis()
    axes.set_xlim(0, 1.18 * top)


def residual_figure(upgrade_map: UpgradeMap) -> Figure:
    """Draw, per new layer and part, the share of the new weights that the maps of heads and units explain."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for pair in upgrade_map.layers:
        for part, fit in {**pair.head_fits, **pair.unit_fits}.items():
            share = float((1 - fit.residual.clamp(max=1) ** 2).mean())
            lines.setdefault(part, []).append((pair.new, 100 * share))
    with new_figure(7.2, 3.4) as figure:
        axes = figure.add_subplot()
        for number, (part, points) in enumerate(lines.items()):
            axes.plot(
                *zip(*points, strict=True), label=part, color=INK if number % 2 else ACCENT, linewidth=1.1,
                marker=MARKERS[number % len(MARKERS)], linestyle=LINE_STYLES[number % len(LINE_STYLES)], markersize=4,
            )  # fmt: skip
        axes.set(ylim=(-3, 103), xticks=ticks(upgrade_map.new.arch.layers))
        axes.set_xlabel("layer of the new backbone")
        axes.set_ylabel("new weights explained\nby the maps (%)")
        axes.grid(axis="y", color=INK, alpha=0.25)
        figure.legend(loc="outside right center", title="part", frameon=False)
    return figure
