"""Figures of the benchmarks on the demo pair: sweeps, costs, predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

GAP = "gap recovered on development items (%)"


def shares(found: dict[str, Any], row: dict[str, Any]) -> list[float]:
    """Return the gap recovered by every seed of a point, in percent."""
    ends = found["ends"]["dev"]
    return [100 * (ends["base"] - nll) / (ends["base"] - ends["full"]) for nll in row["seeds"]]


def lines(found: dict[str, Any], label: str, path: Path) -> None:
    """Draw a line for every series over a logarithmic axis, and a dot for every seed."""
    figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for series in dict.fromkeys(row["series"] for row in found["points"]):
        rows = [row for row in found["points"] if row["series"] == series]
        means = [100 * row["gap_recovered"] for row in rows]
        (line,) = axes.plot([row["x"] for row in rows], means, marker="o", label=series)
        for row in rows:
            each = shares(found, row)
            axes.plot([row["x"]] * len(each), each, ".", color=line.get_color(), markersize=3)
    axes.set_xscale("log", base=2 if label.startswith("rank") else 10)
    axes.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axes.set_xticks(sorted({row["x"] for row in found["points"]}))
    axes.minorticks_off()
    axes.set_xlabel(label)
    axes.set_ylabel(GAP)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_ylim(bottom=max(-40, axes.get_ylim()[0]))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def bars(found: dict[str, Any], label: str, path: Path) -> None:
    """Draw a group of bars for every choice, one a series, and a dot for every seed."""
    names = list(dict.fromkeys(row["x"] for row in found["points"]))
    series = list(dict.fromkeys(row["series"] for row in found["points"]))
    figure, axes = plt.subplots(figsize=(7.5, 0.5 * len(names) + 1.6), layout="constrained")
    height = 0.8 / len(series)
    for number, one in enumerate(series):
        for place, name in enumerate(names):
            row = next(row for row in found["points"] if row["series"] == one and row["x"] == name)
            at = place + number * height
            axes.barh(at, 100 * row["gap_recovered"], height, color=f"C{number}", label=one if not place else None)
            each = shares(found, row)
            axes.plot(each, [at] * len(each), ".", color="black", markersize=3)
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(names))], names)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel(GAP)
    axes.set_title(label, fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def costs(ways: dict[str, dict[str, Any]], full: str, paper_seconds: float, path: Path) -> None:
    """Draw seconds and added memory of every way side by side; a dashed line marks the time that the paper saves."""
    names = list(ways)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True, layout="constrained")
    for axes, key, label in (
        (left, "work_seconds", "processor seconds"),
        (right, "added_mb", "memory on top of libraries (MB)"),
    ):
        drawn = axes.barh(
            names, [ways[name][key] for name in names], color=["0.6" if n == full else "C0" for n in names]
        )
        axes.bar_label(
            drawn, fmt="%.1f" if axes is left else "%.0f", padding=3, fontsize=8,
            bbox={"color": "white", "pad": 0.5},
        )  # fmt: skip
        axes.set_xlabel(label)
        axes.margins(x=0.15)
    saved = ways[full]["work_seconds"] * (1 + paper_seconds)
    left.axvline(saved, color="black", linestyle="--", linewidth=0.8, zorder=0)
    left.text(saved, -0.75, f" paper: {paper_seconds:.0%}", fontsize=8)
    left.invert_yaxis()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def predictions(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the predicted against the measured gap, hollow where development items were scored."""
    figure, axes = plt.subplots(figsize=(5.5, 5), layout="constrained")
    for number, method in enumerate(rows[0]["methods"]):
        for row in rows:
            one = row["methods"][method]
            if one["gap_recovered"] is None:
                continue
            x, y = row["predicted"][method], max(one["gap_recovered"], -0.5)
            fill = "none" if row["development"] else f"C{number}"
            axes.scatter(100 * x, 100 * y, edgecolor=f"C{number}", facecolor=fill, zorder=3)
        axes.scatter([], [], color=f"C{number}", label=method)
    axes.plot([0, 100], [0, 100], color="black", linewidth=0.8)
    axes.axhline(50, color="0.6", linestyle="--", linewidth=0.8)
    axes.set_xlabel("predicted gap recovered (%); hollow: development points")
    axes.set_ylabel("measured gap recovered (%), at least -50 shown")
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)
