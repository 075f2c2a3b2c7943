"""Figures of an upgraded adapter: energy kept, norms of the updates, gap recovered. Needs the extra ``report``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .gap import FULL, OLD, Gap, Result, measure_gap
from .module_norms import ModuleNorm, NormTable
from .style import ACCENT, FILL, HATCHES, INK, LINE_STYLES, MARKERS, new_figure, shorten, ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 3
"""Panels per line of the figure of norms."""


def energy_figure(modules: Sequence[ModuleNorm]) -> Figure:
    """Draw the share of the energy ``||dW||_F^2`` that is left at the final rank, per layer and module."""
    with new_figure(7.2, 3.4) as figure:
        axes = figure.add_subplot()
        for number, (site, group) in enumerate(_by_site(modules).items()):
            axes.plot(
                [row.layer for row in group], [100 * row.energy for row in group], label=shorten(site),
                marker=MARKERS[number % len(MARKERS)], linestyle=LINE_STYLES[number % len(LINE_STYLES)], markersize=4,
                color=INK if number % 2 else ACCENT, linewidth=1.1,
            )  # fmt: skip
        least = min(100 * row.energy for row in modules)
        low = min(90.0, least - 4)
        axes.set(ylim=(low, 100 + 0.06 * (100 - low)), xticks=_layer_ticks(modules))
        axes.set_xlabel("layer of the new backbone")
        axes.set_ylabel("energy kept at this rank (%)")
        axes.set_yticks([tick for tick in axes.get_yticks() if low <= tick <= 100])  # there is no 101 %
        axes.grid(axis="y", color=INK, alpha=0.25)
        figure.legend(loc="outside lower center", frameon=False, ncols=4)
    return figure


def norm_figure(norms: NormTable) -> Figure:
    """Draw the norm of each module's update relative to its weights, the old adapter beside the new one.

    If a backbone is not on this machine, the Frobenius norms of the updates are drawn instead.
    """
    groups = _by_site(norms.modules)
    columns = min(COLUMNS, len(groups))
    lines = -(-len(groups) // columns)
    with new_figure(1.2 + 2.5 * columns, 1.2 + 2.0 * lines) as figure:
        panels = figure.subplots(lines, columns, squeeze=False, sharex=True).ravel()
        for axes, (site, group) in zip(panels, groups.items(), strict=False):
            _draw_norms(axes, group, relative=norms.relative)
            axes.set_title(shorten(site, 30), fontsize=9)
            axes.set_xticks(_layer_ticks(norms.modules, 8))
        for axes in panels[len(groups) :]:
            axes.set_axis_off()
        for axes in panels[max(len(groups) - columns, 0) : len(groups)]:
            axes.tick_params(labelbottom=True)  # the lowest panel of each column, also above an empty one
        what = "relative size ‖ΔW‖ / ‖W‖ (%)" if norms.relative else "size ‖ΔW‖ (Frobenius norm)"
        figure.supylabel(f"update: {what}", fontsize=9)
        figure.supxlabel("layer of the new backbone", fontsize=9)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    return figure


def _draw_norms(axes: Any, group: Sequence[ModuleNorm], *, relative: bool) -> None:
    new = [_height(row.new, row.new_weight, relative=relative) for row in group]
    known = [row for row in group if row.old is not None]
    old = [_height(row.old, row.old_weight, relative=relative) for row in known]
    layers = [row.layer for row in group]
    axes.plot(layers, new, color=INK, marker="o", markersize=4, linewidth=1.2, label="upgraded adapter, new backbone")
    if known:
        axes.plot(
            [row.layer for row in known], old, color=ACCENT, marker="s", markerfacecolor="none", markersize=5,
            linestyle="--", linewidth=1.2, label="old adapter, matched layer of the old backbone",
        )  # fmt: skip
    axes.set_ylim(0, 1.15 * max([*new, *old, 1e-9]))
    axes.grid(axis="y", color=INK, alpha=0.25)


def _height(update: float | None, weight: float | None, *, relative: bool) -> float:
    """Norm of an update, or its percentage of the norm of the weights."""
    if not relative:
        return float(update or 0.0)
    return 100 * float(update or 0.0) / float(weight or 1.0)


def loss_figure(losses: Sequence[float]) -> Figure:
    """Draw the loss over the course of a training."""
    with new_figure(7.2, 2.8) as figure:
        axes = figure.add_subplot()
        axes.plot(range(1, len(losses) + 1), losses, color=INK, marker="o", markersize=3, linewidth=1.2)
        axes.set_ylim(0, 1.1 * max([*losses, 1e-9]))
        axes.set_xticks([1, len(losses)], ["first steps", "last steps"])
        axes.set_ylabel("loss")
        axes.grid(axis="y", color=INK, alpha=0.25)
    return figure


def gap_figure(results: Sequence[Result]) -> Figure:
    """Draw what each result recovers of the gap from the base model to full retraining, beside its accuracy.

    Only the accuracy is drawn if there is no gap (see `gap.measure_gap`).
    """
    gap = measure_gap(results)
    with new_figure(8.4, 1.6 + 0.34 * len(results)) as figure:
        panels = figure.subplots(1, 2 if gap else 1, sharey=True, squeeze=False).ravel()
        if gap:
            _draw_gap(panels[0], results, gap)
        accuracy = panels[-1]
        below = [100 * max(row.accuracy - row.interval[0], 0) for row in results]
        above = [100 * max(row.interval[1] - row.accuracy, 0) for row in results]
        accuracy.errorbar(
            [100 * row.accuracy for row in results], range(len(results)), xerr=[below, above], fmt="D", color=INK,
            ecolor=INK, capsize=3, markersize=4,
        )  # fmt: skip
        accuracy.set_xlabel("accuracy (%), 95 % interval")
        accuracy.set_xlim(0, 100)
        accuracy.grid(axis="both", color=INK, alpha=0.25)
        panels[0].set_yticks(range(len(results)), [shorten(row.label) for row in results])
        panels[0].set_ylim(len(results) - 0.4, -0.6)
    return figure


def _draw_gap(axes: Any, results: Sequence[Result], gap: Gap) -> None:
    values = [100 * (share or 0.0) for share in gap.shares]
    bars = axes.barh(range(len(results)), values, color=FILL, edgecolor=INK, height=0.66)
    for bar, row in zip(bars, results, strict=True):
        bar.set_hatch(_hatch(row.label))
    texts = ["-" if share is None else f"{100 * share:.0f} %" for share in gap.shares]
    axes.bar_label(bars, texts, padding=3)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.axvline(100, color=INK, linewidth=1.0, linestyle="--")
    axes.set_xlim(min(0.0, 1.25 * min(values)), max(125.0, 1.2 * max(values)))
    unit = "answers' likelihood" if gap.metric == "nll" else "accuracy"
    axes.set_xlabel(f"gap recovered (% in {unit},\n100: {shorten(gap.ceiling)})")


def _hatch(label: str) -> str:
    """Pick a hatch by how much labeled data a result has seen: none, light fine-tuning, a fresh LoRA, the full run."""
    if label == FULL:
        return HATCHES[3]
    if "+lft" in label:
        return HATCHES[1]
    return HATCHES[2] if label.startswith("vanilla") else HATCHES[0] if label not in OLD else HATCHES[4]


def _by_site(modules: Sequence[ModuleNorm]) -> dict[str, list[ModuleNorm]]:
    groups: dict[str, list[ModuleNorm]] = {}
    for row in sorted(modules, key=lambda row: row.layer):
        groups.setdefault(row.site, []).append(row)
    return groups


def _layer_ticks(modules: Sequence[ModuleNorm], most: int = 16) -> range:
    return ticks(max(row.layer for row in modules) + 1, most)
