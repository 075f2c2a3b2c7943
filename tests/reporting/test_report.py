"""Figures: labeled, readable in grayscale, in light and dark; the gap recovered."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import command_fixtures
import pytest
from command_fixtures import Pair
from matplotlib import colormaps
from matplotlib.figure import Figure

from peft_lorasuite import LoraSuiteError, UpgradeMap
from peft_lorasuite.evaluation.scores import Evaluation, TaskScore
from peft_lorasuite.reporting import adapter_figures, map_figures, style
from peft_lorasuite.reporting.gap import Result, measure_gap, read_results
from peft_lorasuite.reporting.module_norms import ModuleNorm, NormTable

pair = command_fixtures.pair
UNIT = re.compile(r"\(.*(%|0 to 1|layers|at most 1|norm|mean|number).*\)|percent|layer|head|%", re.DOTALL)
ROWS = [
    Result("base", 0.2, (0.15, 0.26), 240, 3.0, 5.0),
    Result("transplant", 0.5, (0.44, 0.56), 240, 2.0, 60.0),
    Result("transplant+lft", 0.7, (0.64, 0.76), 240, 1.0),
    Result("vanilla-1e-3", 0.4, (0.34, 0.46), 240, 2.5),
    Result("full", 0.9, (0.85, 0.93), 240, 0.5),
]
NORMS = NormTable(
    tuple(ModuleNorm(layer, site, 0.9, 0.1, 0.2, 2.0, 1.0) for layer in (0, 1, 3) for site in ("attn.q", "attn.v")), {}
)
OF_MAP = ["layer_map_figure", "heads_figure", "hidden_figure", "prediction_figure", "residual_figure"]


@pytest.fixture(scope="module")
def upgrade_map(pair: Pair) -> UpgradeMap:
    return UpgradeMap.load(pair.map)


def labels(figure: Figure) -> list[str]:
    """Return the labels of all visible axes, and of the figure."""
    shown = [axes for axes in figure.axes if axes.axison]
    texts = [axes.get_xlabel() for axes in shown] + [axes.get_ylabel() for axes in shown]
    return [text for text in [*texts, figure.get_supxlabel(), figure.get_supylabel()] if text]


def numbered_without_label(figure: Figure) -> list[str]:
    """Return the axes with numbers as ticks and without a label, their own or the figure's."""
    unlabeled = []
    for axes in figure.axes:
        for name, whole in (("x", figure.get_supxlabel()), ("y", figure.get_supylabel())):
            ticks = getattr(axes, f"get_{name}ticklabels")()
            numbers = any(text.get_visible() and re.fullmatch("[\u2212\\d.]+", text.get_text()) for text in ticks)
            if axes.axison and numbers and not (getattr(axes, f"get_{name}label")() or whole):
                unlabeled.append(f"{name} of {axes.get_title()!r}")
    return unlabeled


@pytest.mark.parametrize("name", OF_MAP)
def test_every_figure_of_a_map_has_labels_with_units(upgrade_map: UpgradeMap, name: str) -> None:
    figure = getattr(map_figures, name)(upgrade_map)
    figure.draw_without_rendering()
    texts = labels(figure)
    assert texts
    assert all(UNIT.search(text) for text in texts), texts
    assert [one for one in numbered_without_label(figure) if one != "y of 'Per layer'"] == []  # it shares its y axis


@pytest.mark.parametrize(
    "figure",
    [
        lambda: adapter_figures.energy_figure(NORMS.modules),
        lambda: adapter_figures.norm_figure(NORMS),
        lambda: adapter_figures.norm_figure(NormTable((ModuleNorm(0, "attn.q", 1.0, 0.5),), {})),
        lambda: adapter_figures.gap_figure(ROWS),
        lambda: adapter_figures.gap_figure(ROWS[:2]),
    ],
)
def test_every_figure_of_an_adapter_has_labels_with_units(figure) -> None:
    drawn = figure()
    drawn.draw_without_rendering()
    texts = labels(drawn)
    assert texts
    assert all(UNIT.search(text) for text in texts), texts
    assert numbered_without_label(drawn) == []


def test_the_layer_path_is_that_of_the_map(upgrade_map: UpgradeMap) -> None:
    axes = map_figures.layer_map_figure(upgrade_map).axes[0]
    (line,) = axes.get_lines()
    new, old = line.get_data()
    assert list(zip(old, new, strict=True)) == upgrade_map.pairs
    assert (axes.images[0].get_array() == upgrade_map.similarity.numpy()).all()


def test_a_fixed_layer_map_claims_no_similarity(pair: Pair) -> None:
    from peft_lorasuite import MapOptions

    fixed = UpgradeMap.build(pair.old, pair.new, MapOptions(layer_map="last"))
    axes = map_figures.layer_map_figure(fixed).axes
    assert len(axes) == 1  # no color bar
    assert "not measured" in axes[0].get_title()
    assert len(map_figures.prediction_figure(fixed).axes[0].get_yticklabels()) == 2


def test_relative_norms_are_drawn_old_and_new() -> None:
    panel = adapter_figures.norm_figure(NORMS).axes[0]
    new, old = (line.get_ydata() for line in panel.get_lines())
    assert list(new) == pytest.approx([5.0, 5.0, 5.0])
    assert list(old) == pytest.approx([20.0, 20.0, 20.0])


def test_figures_are_readable_in_grayscale() -> None:
    red, green, blue, _ = colormaps[style.COLORMAP](range(256)).T
    lightness = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    assert (lightness[1:] >= lightness[:-1]).all()
    panel = adapter_figures.gap_figure(ROWS).axes[0]
    hatches = {row.label: bar.get_hatch() or "" for row, bar in zip(ROWS, panel.patches, strict=True)}
    assert len(set(hatches.values())) == 4  # without labels, light fine-tuning, a fresh LoRA, full
    lines = adapter_figures.norm_figure(NORMS).axes[0].get_lines()
    assert len({(line.get_marker(), line.get_linestyle()) for line in lines}) == 2


def test_an_svg_uses_the_colors_of_the_page_and_loads_nothing(upgrade_map: UpgradeMap) -> None:
    for name in OF_MAP:
        text = style.to_svg(getattr(map_figures, name)(upgrade_map), name, 'the "label" & more')
        assert text.startswith('<svg role="img" aria-label="the &quot;label&quot; &amp; more"')
        assert style.INK not in text
        assert style.PAPER not in text
        assert "currentColor" in text
        references = re.findall(r'(?:href="|url\()([^")]+)', text)
        assert all(one.startswith(("#", "data:image/png;base64,")) for one in references)
        assert all(f'id="{one[1:]}"' in text for one in references if one.startswith("#"))


def test_special_characters_of_a_name_are_escaped() -> None:
    odd = Result(r"<b>$\frac$ & 模型", 0.5, (0.4, 0.6), 10, 1.0)
    text = style.to_svg(adapter_figures.gap_figure([*ROWS, odd]), "gap", "gap")
    assert r"&lt;b&gt;$\frac$ &amp; 模型" in text


def test_without_matplotlib_the_error_says_what_to_install(upgrade_map, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(LoraSuiteError, match=r"pip install peft-lorasuite\[report\]"):
        map_figures.prediction_figure(upgrade_map)


def test_the_gap_is_counted_from_base_to_full() -> None:
    found = measure_gap(ROWS)
    assert found is not None
    assert (found.metric, found.ceiling) == ("nll", "full")
    assert found.shares == pytest.approx((0.0, 0.4, 0.8, 0.2, 1.0))
    without = [Result(row.label, row.accuracy, row.interval, row.items) for row in ROWS]
    assert measure_gap(without).shares == pytest.approx((0.0, 3 / 7, 5 / 7, 2 / 7, 1.0))


def test_without_a_full_run_the_old_adapter_is_the_ceiling_and_has_no_share() -> None:
    old = Result("old-adapted", 0.8, (0.7, 0.9), 240, 1.0)
    found = measure_gap([old, *ROWS[:3]])
    assert found.ceiling == "old-adapted"
    assert found.shares == pytest.approx((None, 0.0, 0.5, 1.0))


def test_there_is_no_gap_without_both_bounds_or_if_it_is_too_small() -> None:
    assert measure_gap(ROWS[1:]) is None
    assert measure_gap(ROWS[:2]) is None
    weak = Result("full", 0.2, (0.1, 0.3), 240, 2.95)
    assert measure_gap([ROWS[0], weak]) is None


def test_results_of_the_benchmark_and_of_evaluate_are_read(tmp_path: Path) -> None:
    for row in reversed(ROWS):
        values = {
            "row": row.label,
            "accuracy": row.accuracy,
            "interval": row.interval,
            "items": row.items,
            "nll": row.nll,
        }
        (tmp_path / f"{row.label}.json").write_text(json.dumps(values | {"right": [1], "machine": {}}))
    read = read_results(tmp_path)
    assert (read[0].label, read[-1].label, len(read)) == ("base", "full", 5)
    other = tmp_path / "evaluated"
    other.mkdir()
    score = TaskScore("boolq", ("a", "b"), (1.0, 0.0))
    for number, adapter in enumerate([None, "some/where/my-lora"]):
        Evaluation((score,), "model", "generate", adapter).save(other / f"{number}.json")
    assert [(row.label, row.accuracy, row.items) for row in read_results(other)] == [
        ("base", 0.5, 2), ("my-lora", 0.5, 2),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("files", "message"),
    [(None, "folder of results does"), ({}, "the folder has no results"), ({"a.json": "{}"}, "row: missing value"),
     ({"a.json": "nonsense"}, "cannot be read as JSON"), ({"a.json": "[]"}, "must contain a JSON object")],
)  # fmt: skip
def test_malformed_results_are_refused(tmp_path: Path, files: dict[str, str] | None, message: str) -> None:
    for name, text in (files or {}).items():
        (tmp_path / name).write_text(text)
    with pytest.raises(LoraSuiteError, match=message):
        read_results(tmp_path if files is not None else tmp_path / "none")
