"""A real headless browser: what a page looks like, and what a script finds in a copy of it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any

from patience import limit

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
    "--disable-dev-shm-usage", "--virtual-time-budget=2000", "--enable-logging=stderr",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip
SCHEMES = {"dark": 0, "light": 1}
MEASURE = """
const page = document.documentElement, found = {cut: [], outside: [], pale: [], svgs: 0, texts: 0};
for (const one of document.querySelectorAll('details')) one.open = true;
function light(color) {
  const parts = color.match(/[\\d.]+/g).slice(0, 3).map(one => one / 255);
  const [r, g, b] = parts.map(one => one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function ground(element) {
  const color = element ? getComputedStyle(element).backgroundColor : 'rgb(255, 255, 255)';
  return /, 0\\)$/.test(color) ? ground(element.parentElement) : color;
}
for (const element of document.querySelectorAll('body *')) {
  const style = getComputedStyle(element);
  const clips = style.overflowX !== 'visible' && !element.closest('svg');
  const own = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
  const wider = element.scrollWidth > element.clientWidth + 1;
  if (own && clips && wider) found.cut.push(element.tagName + element.textContent.slice(0, 40));
  if (own && !element.closest('svg, script, style')) {
    const both = [light(style.color), light(ground(element))].sort((a, b) => b - a);
    if ((both[0] + 0.05) / (both[1] + 0.05) < 4.5) found.pale.push(element.textContent.trim().slice(0, 40));
  }
}
for (const svg of document.querySelectorAll('svg')) {
  const frame = svg.getBoundingClientRect();
  found.svgs += 1;
  for (const text of svg.querySelectorAll('text')) {
    const box = text.getBoundingClientRect();
    found.texts += 1;
    const across = box.left >= frame.left - 1 && box.right <= frame.right + 1;
    const inside = across && box.top >= frame.top - 1 && box.bottom <= frame.bottom + 1;
    if (!inside && text.textContent.trim()) found.outside.push(text.textContent);
  }
}
const style = getComputedStyle(document.body), text = document.querySelector('svg text');
found.wide = page.scrollWidth - page.clientWidth;
found.ground = style.backgroundColor;
found.ink = style.color;
found.drawn = text ? getComputedStyle(text).fill : '';
const asking = document.querySelectorAll('[src], link[href], image[href], use[href]');
const asked = [...asking].map(one => one.getAttribute('src') || one.getAttribute('href'));
const fetched = performance.getEntriesByType('resource').map(one => one.name);
found.fetched = [...new Set([...asked, ...fetched])].filter(name => !/^(data:|#)/.test(name));
found.errors = window.heard;
found.height = page.scrollHeight;
const measured = document.createElement('pre');
measured.id = 'measured';
measured.textContent = JSON.stringify(found);
document.body.append(measured);
"""

LISTEN = "window.heard = []; window.addEventListener('error', found => window.heard.push(found.message));"


@dataclass(frozen=True)
class Browser:
    """An installed Chromium; every run has a profile of its own.

    Attributes:
        program: Its file.
        home: Folder for profiles and copies.
    """

    program: str
    home: Path

    def screenshot(self, page: Path, image: Path, *, scheme: str, width: int, height: int) -> str:
        """Write a picture of the page as it is; return what the browser complained of."""
        done = self._run(page, scheme, width, height, f"--screenshot={image}")
        return "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)

    def measure(self, page: Path, *, scheme: str, width: int) -> dict[str, Any]:
        """Return what a script finds in a copy of the page, whose policy lets the script run."""
        text = page.read_text(encoding="utf-8")
        text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
        copy = self.home / f"{page.stem}-measured.html"
        copy.write_text(
            text.replace("</body>", f"<script>{MEASURE}</script></body>").replace(
                "<head>", f"<head><script>{LISTEN}</script>", 1
            ),
            encoding="utf-8",
        )
        done = self._run(copy, scheme, width, 900, "--dump-dom")
        found = re.search(r'<pre id="measured">(.*?)</pre>', done.stdout, re.DOTALL)
        assert found, done.stderr[-2000:]
        return json.loads(unescape(found.group(1)))

    def _run(self, page: Path, scheme: str, width: int, height: int, what: str) -> subprocess.CompletedProcess[str]:
        profile = self.home / "profile"
        shutil.rmtree(profile, ignore_errors=True)
        look = f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}"
        call = [self.program, *QUIET, look, f"--user-data-dir={profile}", f"--window-size={width},{height}", what]
        return subprocess.run(
            [*call, page.as_uri()], capture_output=True, text=True, encoding="utf-8", timeout=limit(120), check=True
        )


def installed() -> str | None:
    """Return the browser's program, or None."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)
