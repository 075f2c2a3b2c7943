"""Pictures of an upgraded adapter: energy kept, size of the updates, gap recovered. Needs the extra ``report``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .gap import FULL, OLD, Gain, Gap, gap
from .module_norms import Size, Sizes
from .style import ACCENT, DASHES, FILL, HATCHES, INK, MARKS, drawing, short, ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 3
"""Panels side by side."""


def energy_figure(rows: Sequence[Size]) -> Figure:
    """Draw the share of the energy ``||dW||_F^2`` that the rank kept, per layer and module."""
    with drawing(7.2, 3.4) as figure:
        axes = figure.add_subplot()
        for number, (site, group) in enumerate(_by_site(rows).items()):
            axes.plot(
                [row.layer for row in group], [100 * row.energy for row in group], label=short(site),
                marker=MARKS[number % len(MARKS)], linestyle=DASHES[number % len(DASHES)], markersize=4,
                color=INK if number % 2 else ACCENT, linewidth=1.1,
            )  # fmt: skip
        least = min(100 * row.energy for row in rows)
        low = min(90.0, least - 4)
        axes.set(ylim=(low, 100 + 0.06 * (100 - low)), xticks=_layers(rows))
        axes.set_xlabel("layer of the new backbone")
        axes.set_ylabel("energy kept at this rank (%)")
        axes.set_yticks([tick for tick in axes.get_yticks() if low <= tick <= 100])  # there is no 101 %
        axes.grid(axis="y", color=INK, alpha=0.25)
        figure.legend(loc="outside lower center", frameon=False, ncols=4)
    return figure


def size_figure(sizes: Sizes) -> Figure:
    """Draw how large each module's update is against its own weights, the old adapter beside the new one.

    Where a backbone is not at hand, the updates' own Frobenius norms are drawn instead.
    """
    groups = _by_site(sizes.rows)
    columns = min(COLUMNS, len(groups))
    lines = -(-len(groups) // columns)
    with drawing(1.2 + 2.5 * columns, 1.2 + 2.0 * lines) as figure:
        panels = figure.subplots(lines, columns, squeeze=False, sharex=True).ravel()
        for axes, (site, group) in zip(panels, groups.items(), strict=False):
            _panel(axes, group, relative=sizes.relative)
            axes.set_title(short(site, 30), fontsize=9)
            axes.set_xticks(_layers(sizes.rows, 8))
        for axes in panels[len(groups) :]:
            axes.set_axis_off()
        for axes in panels[max(len(groups) - columns, 0) : len(groups)]:
            axes.tick_params(labelbottom=True)  # the lowest of each column, also above a place that is empty
        what = "relative size ‖ΔW‖ / ‖W‖ (%)" if sizes.relative else "size ‖ΔW‖ (Frobenius norm)"
        figure.supylabel(f"update: {what}", fontsize=9)
        figure.supxlabel("layer of the new backbone", fontsize=9)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    return figure


def _panel(axes: Any, group: Sequence[Size], *, relative: bool) -> None:
    new = [_share(row.new, row.new_weight, relative=relative) for row in group]
    known = [row for row in group if row.old is not None]
    old = [_share(row.old, row.old_weight, relative=relative) for row in known]
    layers = [row.layer for row in group]
    axes.plot(layers, new, color=INK, marker="o", markersize=4, linewidth=1.2, label="upgraded adapter, new backbone")
    if known:
        axes.plot(
            [row.layer for row in known], old, color=ACCENT, marker="s", markerfacecolor="none", markersize=5,
            linestyle="--", linewidth=1.2, label="old adapter, matched layer of the old backbone",
        )  # fmt: skip
    axes.set_ylim(0, 1.15 * max([*new, *old, 1e-9]))
    axes.grid(axis="y", color=INK, alpha=0.25)


def _share(update: float | None, weight: float | None, *, relative: bool) -> float:
    if not relative:
        return float(update or 0.0)
    return 100 * float(update or 0.0) / float(weight or 1.0)


def gap_figure(rows: Sequence[Gain]) -> Figure:
    """Draw what each row recovers of the gap from the bare backbone to full retraining, beside its accuracy.

    Where there is no gap to speak of (see `gains.gap`), accuracy alone is drawn.
    """
    measured = gap(rows)
    with drawing(8.4, 1.6 + 0.34 * len(rows)) as figure:
        panels = figure.subplots(1, 2 if measured else 1, sharey=True, squeeze=False).ravel()
        if measured:
            _gap_panel(panels[0], rows, measured)
        accuracy = panels[-1]
        sides = [[row.accuracy - row.interval[0] for row in rows], [row.interval[1] - row.accuracy for row in rows]]
        accuracy.errorbar(
            [100 * row.accuracy for row in rows], range(len(rows)), xerr=[[100 * max(one, 0) for one in side]
            for side in sides], fmt="D", color=INK, ecolor=INK, capsize=3, markersize=4,
        )  # fmt: skip
        accuracy.set_xlabel("accuracy (%), 95 % interval")
        accuracy.set_xlim(0, 100)
        accuracy.grid(axis="both", color=INK, alpha=0.25)
        panels[0].set_yticks(range(len(rows)), [short(row.label) for row in rows])
        panels[0].set_ylim(len(rows) - 0.4, -0.6)
    return figure


def _gap_panel(axes: Any, rows: Sequence[Gain], measured: Gap) -> None:
    values = [100 * (share or 0.0) for share in measured.shares]
    bars = axes.barh(range(len(rows)), values, color=FILL, edgecolor=INK, height=0.66)
    for bar, row in zip(bars, rows, strict=True):
        bar.set_hatch(_hatch(row.label))
    texts = ["-" if share is None else f"{100 * share:.0f} %" for share in measured.shares]
    axes.bar_label(bars, texts, padding=3)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.axvline(100, color=INK, linewidth=1.0, linestyle="--")
    axes.set_xlim(min(0.0, 1.25 * min(values)), max(125.0, 1.2 * max(values)))
    unit = "answers' likelihood" if measured.value == "nll" else "accuracy"
    axes.set_xlabel(f"gap recovered (% in {unit},\n100: {short(measured.ceiling)})")


def _hatch(label: str) -> str:
    """Tell rows that saw labels from those that did not: light fine-tuning, a fresh LoRA, the full run."""
    if label == FULL:
        return HATCHES[3]
    if "+lft" in label:
        return HATCHES[1]
    return HATCHES[2] if label.startswith("vanilla") else HATCHES[0] if label not in OLD else HATCHES[4]


def _by_site(rows: Sequence[Size]) -> dict[str, list[Size]]:
    groups: dict[str, list[Size]] = {}
    for row in sorted(rows, key=lambda row: row.layer):
        groups.setdefault(row.site, []).append(row)
    return groups


def _layers(rows: Sequence[Size], most: int = 16) -> range:
    return ticks(max(row.layer for row in rows) + 1, most)
