"""`inspect`: one HTML file that stands alone, whole or not at all."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import command_fixtures
import pytest
from command_fixtures import Pair

from peft_lorasuite import LoraSuiteError
from peft_lorasuite.cli.main import main
from peft_lorasuite.reporting.inspect import inspect

pair = command_fixtures.pair
OF_MAP = ["prediction", "layers", "heads", "explained", "hidden"]
ALL = ["gap", "energy", "size", *OF_MAP]
ACCURACY = {"base": 0.2, "lorasuite": 0.5, "lorasuite+lft": 0.7, "vanilla-1e-3": 0.45, "full": 0.9, "old-adapted": 0.8}


def run(*words: Any) -> int:
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def upgraded(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("upgraded") / "new-lora"
    call = ["upgrade", pair.adapter, "--to", pair.new, "--map", pair.map, "--method", "lorasuite", "--quiet"]
    assert run(*call, "-o", folder) == 0
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    for label, value in ACCURACY.items():
        row = {
            "row": label,
            "accuracy": value,
            "interval": [value - 0.06, value + 0.06],
            "items": 240,
            "nll": 3 - 2 * value,
        }
        (folder / f"{label}.json").write_text(json.dumps(row))
    return folder


@pytest.fixture(scope="module")
def whole(pair: Pair, upgraded: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with everything that there is to show."""
    page = tmp_path_factory.mktemp("page") / "report.html"
    given = ["--map", pair.map, "--rows", rows, "--old-adapter", pair.adapter]
    assert run("inspect", upgraded, "-o", page, "--quiet", *given) == 0
    return page


class Elements(HTMLParser):
    """Counts elements, checks that they close, and gathers what they refer to."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.references: list[str] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_report_of_an_adapter_shows_everything(whole: Path) -> None:
    found = Elements(whole.read_text(encoding="utf-8"))
    assert not found.open
    assert found.tags["svg"] == found.tags["figcaption"] == len(ALL)
    text = " ".join(found.words)
    for expected in ("Gap recovered", "Coverage", "Energy kept", "Size of the updates", "Scores of the pair", "Layers",
                 "Heads and units", "Hidden map", "How it was made", "100.0% of the old adapter's 18 tensors", "q_proj",
                 "plan to retrain", "Based on: shared tokens", "lorasuite+lft", "To repeat this:",
                 "--method lorasuite --rank", "Options of the method"):  # fmt: skip
        assert expected in text, expected
    assert "Not shown" not in text
    assert "Frobenius norm of each update, in percent" in text  # the old adapter and both backbones were found


def test_the_report_stands_alone(whole: Path) -> None:
    text = whole.read_text(encoding="utf-8")
    found = Elements(text)
    assert not set(found.tags) & {"script", "iframe", "object", "embed", "link", "img", "video", "audio", "form"}
    assert all(one.startswith(("#", "data:image/png;base64,")) for one in found.references)
    assert not re.findall(r"url\((?!#)", text)
    assert "@import" not in text
    assert """content="default-src &#x27;none&#x27;; style-src &#x27;unsafe-inline&#x27;; img-src data:">""" in text
    ids = Counter(re.findall(r'\bid="([^"]+)"', text))
    referred = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    assert all(ids[one] == 1 for one in referred)  # no figure borrows from another


def test_the_json_output_lists_the_figures_of_a_map(pair: Pair, tmp_path: Path, capsys) -> None:
    page = tmp_path / "folder" / "map.html"
    assert run("inspect", pair.map, "-o", page, "--json") == 0
    output = json.loads(capsys.readouterr().out)
    assert output["figures"] == OF_MAP
    assert list(output["missing"]) == ["gap"]
    assert "Not shown: gap: no measured results were given (--rows DIR" in page.read_text(encoding="utf-8")
    assert [path.name for path in page.parent.iterdir()] == ["map.html"]


def test_what_is_not_given_is_named(upgraded: Path, tmp_path: Path, capsys) -> None:
    assert run("inspect", upgraded, "-o", tmp_path / "a.html") == 0
    output = capsys.readouterr().out
    assert "2 figures (energy, size)" in output
    for name in ("gap", "map", "the old adapter"):
        assert f"  not shown: {name}: " in output
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "plan to retrain" in text  # the report beside the weights keeps the prediction


def test_without_the_backbone_s_weights_the_sizes_are_absolute(pair: Pair, upgraded: Path, tmp_path: Path) -> None:
    for folder, given in ((tmp_path / "lora", upgraded), (tmp_path / "base", pair.new)):
        shutil.copytree(given, folder)
    (tmp_path / "base" / "model.safetensors").unlink()
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "base")
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    contents = inspect(tmp_path / "lora", tmp_path / "a.html", old_adapter=pair.adapter)
    assert contents.figures == ["energy", "size"]
    assert "the new backbone" in contents.missing or "the weights" in contents.missing
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "Frobenius norm of each update, as transferred" in text
    assert "old adapter, matched layer" in text  # its own sizes are known all the same


def test_a_backbone_that_moved_is_named_on_the_command_line(
    pair: Pair, upgraded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = shutil.copytree(pair.adapter, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "gone/away"}))
    call = ["inspect", upgraded, "-o", tmp_path / "a.html", "--old-adapter", adapter, "--overwrite"]
    assert run(*call) == 0
    assert "  not shown: the old backbone: backbone gone/away" in capsys.readouterr().out
    assert "old adapter, matched layer" not in (tmp_path / "a.html").read_text(encoding="utf-8")
    assert run(*call, "--from", pair.old, "--to", pair.new) == 0
    assert "the old backbone" not in capsys.readouterr().out
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "old adapter, matched layer" in text
    assert "in percent of the norm" in text
    assert run("inspect", pair.map, "-o", tmp_path / "m.html", "--from", pair.old) == 1
    assert "--from is for an adapter, and this is a map" in capsys.readouterr().err


def test_untrusted_names_are_escaped(upgraded: Path, tmp_path: Path) -> None:
    report = upgraded / "lorasuite_report.json"
    kept = report.read_text()
    values = json.loads(kept)
    values |= {"adapter": "<script>alert(1)</script>", "old": 'x" onload="y', "new": "&amp;<b>"}
    values["tensors"]["<img src=x>.q_proj.lora_A.weight"] = "not transferred: <i>why</i>"
    try:
        report.write_text(json.dumps(values))
        inspect(upgraded, tmp_path / "a.html")
    finally:
        report.write_text(kept)
    found = Elements((tmp_path / "a.html").read_text(encoding="utf-8"))
    assert not set(found.tags) & {"script", "img", "b", "i"}
    assert "<script>alert(1)</script>" in " ".join(found.words)


def test_a_file_that_is_there_stays_unless_it_may_be_replaced(pair: Pair, tmp_path: Path, capsys) -> None:
    page = tmp_path / "report.html"
    page.write_text("mine")
    assert run("inspect", pair.map, "-o", page) == 1
    assert "the output file exists" in capsys.readouterr().err
    assert page.read_text() == "mine"
    assert run("inspect", pair.adapter, "-o", page, "--overwrite") == 1  # it was never upgraded
    assert "its report is missing" in capsys.readouterr().err
    assert page.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert run("inspect", pair.map, "-o", page, "--overwrite", "--quiet") == 0
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_what_cannot_be_inspected_is_refused(pair: Pair, upgraded: Path, tmp_path: Path) -> None:
    with pytest.raises(LoraSuiteError, match="neither an upgrade map nor an adapter"):
        inspect(pair.new, tmp_path / "a.html")
    with pytest.raises(LoraSuiteError, match="--map is for an adapter"):
        inspect(pair.map, tmp_path / "a.html", upgrade_map=pair.map)
    with pytest.raises(LoraSuiteError, match="the output is a folder"):
        inspect(pair.map, tmp_path)
    with pytest.raises(LoraSuiteError, match="folder of results does not exist"):
        inspect(pair.map, tmp_path / "a.html", rows=tmp_path / "none")
    with pytest.raises(LoraSuiteError, match="none: adapter not found"):
        inspect(upgraded, tmp_path / "a.html", old_adapter=tmp_path / "none")
    with pytest.raises(LoraSuiteError, match="--from: the old backbone is of no use without its adapter"):
        inspect(upgraded, tmp_path / "a.html", old=pair.old)
    (tmp_path / "broken").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "broken" / name).write_bytes((upgraded / name).read_bytes())
    (tmp_path / "broken" / "lorasuite_report.json").write_text('{"method": {"name": "lorasuite"}}')
    with pytest.raises(LoraSuiteError, match=r"lorasuite_report.json, adapter: missing value"):
        inspect(tmp_path / "broken", tmp_path / "a.html")
    report = json.loads((upgraded / "lorasuite_report.json").read_text()) | {"revisions": 5}
    (tmp_path / "broken" / "lorasuite_report.json").write_text(json.dumps(report))
    with pytest.raises(LoraSuiteError, match=r"lorasuite_report.json, revisions: malformed value .got 5"):
        inspect(tmp_path / "broken", tmp_path / "a.html")
    report |= {"revisions": {}, "verdict": "\ud800"}
    (tmp_path / "broken" / "lorasuite_report.json").write_text(json.dumps(report))
    with pytest.raises(LoraSuiteError, match=r"lorasuite_report.json, verdict: control characters"):
        inspect(tmp_path / "broken", tmp_path / "a.html")
    (tmp_path / "rows" / "b.json").mkdir(parents=True)
    with pytest.raises(LoraSuiteError, match="the file cannot be read as JSON"):
        inspect(pair.map, tmp_path / "a.html", rows=tmp_path / "rows")
    assert not (tmp_path / "a.html").exists()


def test_the_verdict_is_the_same_with_and_without_a_map(whole: Path, upgraded: Path, tmp_path: Path) -> None:
    inspect(upgraded, tmp_path / "a.html")
    said = json.loads((upgraded / "lorasuite_report.json").read_text())["verdict"]
    for page in (whole, tmp_path / "a.html"):
        (found,) = re.findall(r'<p class="verdict"><strong>(.*?)</strong>', page.read_text(encoding="utf-8"))
        assert unescape(found) == f"{said[0].upper()}{said[1:]}."


def test_samples_and_the_loss_are_shown_and_a_single_module_is_no_chart(upgraded: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(upgraded, tmp_path / "lora")
    report = json.loads((folder / "lorasuite_report.json").read_text())
    sample = {"prompt": "red <b>cat", "base": "blue\ndog", "upgraded": "cat", "old": "cat!"}
    report["facts"] |= {"samples": [sample] * 12, "lorasuite": {"losses": [2.0, 1.0, 0.5]}}
    (folder / "lorasuite_report.json").write_text(json.dumps(report))
    assert inspect(folder, tmp_path / "a.html").figures[0] == "loss"
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert text.count("red &lt;b&gt;cat") == text.count("blue\ndog") == 10
    assert "from 2.000 to 0.500" in text
    report["modules"] = report["modules"][:1]
    report["facts"]["lorasuite"]["losses"] = [2.0]
    (folder / "lorasuite_report.json").write_text(json.dumps(report))
    assert inspect(folder, tmp_path / "b.html").figures == []
    assert "The only module is " in (tmp_path / "b.html").read_text(encoding="utf-8")
