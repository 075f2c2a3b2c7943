"""The demo as a user runs it, and its gap recovered, with a margin for rounding on another machine."""

from __future__ import annotations

import json

import pytest

from peft_lorasuite.cli.main import main


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "out"
    assert main(["demo", "-o", str(folder), "--quiet"]) == 0
    return folder


def rows(folder):
    return json.loads((folder / "demo.json").read_text())["rows"]


def test_the_demo_writes_adapter_table_figures_and_picture(demo):
    assert {"upgraded", "upgraded-finetuned", "demo.json", "table.md"} <= {path.name for path in demo.iterdir()}
    assert (demo / "upgraded" / "adapter_config.json").is_file()
    pytest.importorskip("matplotlib", reason="the demo draws the layer map")
    assert (demo / "layer_map.png").read_bytes().startswith(b"\x89PNG")


def test_the_gap_recovered_does_not_fall(demo):
    base, vanilla, _, behavior, distilled, tuned, full = rows(demo)
    gain = base["nll"] - full["nll"]
    named = {"behavior": behavior, "distilled": distilled, "tuned": tuned, "vanilla": vanilla}
    recovered = {name: (base["nll"] - row["nll"]) / gain for name, row in named.items()}
    assert recovered["behavior"] > 0.35
    assert recovered["distilled"] > 0.85
    assert recovered["tuned"] > 0.65
    assert recovered["vanilla"] < 0.6  # or the demo would tell nothing
    assert distilled["accuracy"] > 0.75
