"""The report in a real browser, where there is one: in light and dark, on a phone and on a wide screen."""

from __future__ import annotations

import re
from pathlib import Path

import command_fixtures
import pytest
import test_inspect
from browser import Browser, installed
from test_inspect import ALL

pair, rows, upgraded, whole = command_fixtures.pair, test_inspect.rows, test_inspect.upgraded, test_inspect.whole


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Browser:
    program = installed()
    if program is None:
        pytest.skip("no Chromium is installed: the report is not opened in a browser")
    return Browser(program, tmp_path_factory.mktemp("browser"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_nothing_is_cut_off_or_fetched_in_a_browser(browser: Browser, whole: Path, scheme: str, width: int) -> None:
    found = browser.measure(whole, scheme=scheme, width=width)
    assert (found["cut"], found["outside"], found["fetched"]) == ([], [], [])
    assert found["wide"] <= 0
    assert found["pale"] == []
    assert found["errors"] == []
    assert found["svgs"] == len(ALL)
    assert found["texts"] > 100
    assert found["ink"] == found["drawn"]  # figures follow the page
    ground, ink = (_lightness(found[name]) for name in ("ground", "ink"))
    contrast = (max(ground, ink) + 0.05) / (min(ground, ink) + 0.05)
    assert contrast > 12
    assert (ground < ink) == (scheme == "dark")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_itself_is_painted_and_its_policy_is_kept(
    browser: Browser, whole: Path, scheme: str, tmp_path: Path
) -> None:
    from matplotlib.image import imread

    complaints = browser.screenshot(whole, tmp_path / "page.png", scheme=scheme, width=1100, height=5200)
    assert complaints == ""
    picture = imread(tmp_path / "page.png")[..., :3]
    assert picture.shape[:2] == (5200, 1100)
    corner = float(picture[0, 0].mean())
    assert corner < 0.2 if scheme == "dark" else corner > 0.9
    painted = abs(picture - picture[0, 0]).max(axis=2) > 0.3
    assert 0.03 < painted.mean() < 0.6
    assert all(painted[top : top + 650].any() for top in range(0, 5200, 650))
    spread = picture.max(axis=2) - picture.min(axis=2)
    assert (spread > 0.3).mean() > 0.02  # the heat maps, which are images inside the file, are there


def _lightness(color: str) -> float:
    """Relative luminance of ``rgb(r, g, b)``, as the contrast rules define it."""
    values = [int(one) / 255 for one in re.findall(r"\d+", color)[:3]]
    linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in values]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_browser_would_find_faults(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text(
        """<!doctype html><html><head><meta http-equiv="Content-Security-Policy" content="default-src 'none'"></head>
        <body><p style="overflow:hidden;white-space:nowrap">""" + "long " * 500 + """</p>
        <p style="color:#bbb">pale words</p><script>nothing.here()</script>
        <svg width="50" height="20"><text x="40" y="15">outside</text></svg>
        <img src="http://example.org/a.png"></body></html>"""
    )  # fmt: skip
    found = browser.measure(page, scheme="light", width=800)
    assert len(found["cut"]) == 1
    assert found["pale"] == ["pale words"]
    assert len(found["errors"]) == 1
    assert found["outside"] == ["outside"]
    assert found["fetched"] == ["http://example.org/a.png"]
    assert "Content Security Policy" in browser.screenshot(
        page, tmp_path / "bad.png", scheme="light", width=800, height=600
    )
