"""One HTML file that needs nothing else: sections of text, tables and figures, light and dark, no script."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from .._version import __version__

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
STYLE = """
:root { color-scheme: light dark; --paper: #fdfdfc; --ink: #16181d; --quiet: #565b66;
  --line: #c9ccd3; --raised: #f1f2f4 }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15171b; --ink: #eceef1; --quiet: #a9afba; --line: #3d424c; --raised: #1f2228 }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem 1.25rem 4rem; max-width: 68rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, "DejaVu Sans", Verdana, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--line) }
p { margin: .5rem 0; max-width: 48rem }
.quiet, figcaption, caption { color: var(--quiet); font-size: .9rem }
.verdict { border: 2px solid var(--ink); border-radius: .4rem; padding: .6rem .9rem; margin: 1rem 0;
  background: var(--raised) }
.scroll { overflow-x: auto }
.scroll table { overflow-wrap: break-word }
figure { margin: 1rem 0 }
figure svg { display: block; max-width: 100%; height: auto; min-width: 34rem }
figcaption { margin-top: .4rem; max-width: 48rem }
table { border-collapse: collapse; margin: .75rem 0; font-variant-numeric: tabular-nums }
caption { text-align: left; padding-bottom: .3rem }
th, td { text-align: left; vertical-align: top; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line);
  min-width: 4.5rem }
td.number { text-align: right }
@media print { body { max-width: none } h2 { break-after: avoid } figure, table { break-inside: avoid } }
""".strip()


@dataclass(frozen=True)
class Part:
    """A section of a page.

    Attributes:
        title: Its heading.
        body: Elements made by the functions below, in order.
    """

    title: str
    body: Sequence[str]


def page(title: str, about: str, head: Iterable[str], parts: Iterable[Part]) -> str:
    """Return a whole HTML document.

    Args:
        title: Heading and window title; any text.
        about: A line below it; any text.
        head: Elements before the first section.
        parts: The sections.
    """
    sections = [
        f"<section>\n<h2>{escape(part.title)}</h2>\n{joined}\n</section>"
        for part in parts
        if (joined := "\n".join(part.body))
    ]
    return "\n".join(
        [
            "<!doctype html>", '<html lang="en">', "<head>", '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{escape(title)}</title>", f"<style>\n{STYLE}\n</style>", "</head>", "<body>", "<main>",
            f"<h1>{escape(title)}</h1>", f'<p class="quiet">{escape(about)}</p>', *head, *sections, "</main>",
            f'<p class="quiet">Written by peft-lorasuite {escape(__version__)}. Nothing in this file is fetched.</p>',
            "</body>", "</html>", "",
        ]
    )  # fmt: skip


def text(words: str, kind: str = "") -> str:
    """Return a paragraph; any text."""
    return f'<p class="{kind}">{escape(words)}</p>' if kind else f"<p>{escape(words)}</p>"


def verdict(word: str, because: str) -> str:
    """Return a framed statement: a word in bold, and what it rests on."""
    return f'<p class="verdict"><strong>{escape(word)}</strong> {escape(because)}</p>'


def figure(svg: str, caption: str) -> str:
    """Return a figure with its caption; the SVG comes from `figures.svg`."""
    return f'<figure><div class="scroll">{svg}</div><figcaption>{escape(caption)}</figcaption></figure>'


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], caption: str = "") -> str:
    """Return a table; numbers are set flush right, everything is escaped."""
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    lines = "\n".join(f"<tr>{''.join(_cell(value) for value in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table>{title}<thead><tr>{top}</tr></thead>\n<tbody>\n{lines}\n</tbody></table></div>'


def facts(values: Mapping[str, Any]) -> str:
    """Return a table of names and values without a head."""
    lines = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(str(value))}</td></tr>' for name, value in values.items()
    )
    return f'<div class="scroll"><table><tbody>\n{lines}\n</tbody></table></div>'


def _cell(value: Any) -> str:
    words = str(value)
    number = isinstance(value, (int, float)) or words[:1].isdigit() or (words[:1] in "+-" and len(words) < 9)
    return f'<td class="number">{escape(words)}</td>' if number else f"<td>{escape(words)}</td>"
