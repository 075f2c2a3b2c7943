"""Building blocks of a self-contained HTML report: text, tables and figures, in light and dark, without scripts.

Every text is escaped: names in a report come from untrusted repositories.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

from .._version import __version__
from .style import to_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""Content security policy of the page: it loads nothing and runs nothing."""
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
th[scope=row] { font-weight: 600 }
th[scope=row] + td { white-space: pre-line }
pre { white-space: pre-wrap; background: var(--raised); padding: .6rem .9rem; border-radius: .4rem; font-size: .9rem }
summary { cursor: pointer; margin: .5rem 0 }
@media print { body { max-width: none } h2 { break-after: avoid } figure, table { break-inside: avoid } }
""".strip()


@dataclass(frozen=True)
class Section:
    """A section of a page.

    Attributes:
        title: Its heading.
        body: HTML elements, in order.
    """

    title: str
    body: Sequence[str]


@dataclass
class ReportContents:
    """The figures of a report: those that it shows, and those that it cannot show.

    Attributes:
        figures: Names of the figures that were drawn.
        missing: Name of what is not shown -> the reason.
    """

    figures: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)

    def add_figure(self, name: str, draw: Callable[[], Figure], caption: str) -> str:
        """Draw a figure and return its element."""
        self.figures.append(name)
        return figure(to_svg(draw(), name, caption), caption)

    def add_missing(self, name: str, reason: str) -> str:
        """Record that something is not shown and return a paragraph that says why."""
        self.missing[name] = reason
        return paragraph(f"Not shown: {name}: {reason}.", "quiet")


def page(title: str, about: str, head: Iterable[str], sections: Iterable[Section]) -> str:
    """Return a whole HTML document.

    Args:
        title: Heading and window title.
        about: A line below it.
        head: HTML elements before the first section.
        sections: The sections; one without elements is left out.
    """
    bodies = [
        f"<section>\n<h2>{escape(section.title)}</h2>\n{body}\n</section>"
        for section in sections
        if (body := "\n".join(section.body))
    ]
    return "\n".join(
        [
            "<!doctype html>", '<html lang="en">', "<head>", '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{escape(title)}</title>", f"<style>\n{STYLE}\n</style>", "</head>", "<body>", "<main>",
            f"<h1>{escape(title)}</h1>", f'<p class="quiet">{escape(about)}</p>', *head, *bodies, "</main>",
            f'<p class="quiet">Written by peft-lorasuite {escape(__version__)}. This file loads nothing else.</p>',
            "</body>", "</html>", "",
        ]
    )  # fmt: skip


def paragraph(text: str, css_class: str = "") -> str:
    """Return a paragraph."""
    return f'<p class="{css_class}">{escape(text)}</p>' if css_class else f"<p>{escape(text)}</p>"


def verdict(headline: str, explanation: str) -> str:
    """Return a framed statement: a headline in bold, and what it is based on."""
    return f'<p class="verdict"><strong>{escape(headline)}</strong> {escape(explanation)}</p>'


def figure(svg: str, caption: str) -> str:
    """Return a figure with its caption; ``svg`` comes from `style.to_svg` and is not escaped."""
    return f'<figure><div class="scroll">{svg}</div><figcaption>{escape(caption)}</figcaption></figure>'


def details(title: str, body: str) -> str:
    """Return an element that shows its body when its title is clicked; ``body`` is HTML and not escaped."""
    return f"<details><summary>{escape(title)}</summary>\n{body}\n</details>"


def code_block(text: str) -> str:
    """Return a text as code, with its line ends."""
    return f"<pre>{escape(text)}</pre>"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], caption: str = "") -> str:
    """Return a table; numbers are aligned to the right."""
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    lines = "\n".join(f"<tr>{''.join(_cell(value) for value in row)}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table>{title}<thead><tr>{columns}</tr></thead>\n<tbody>\n{lines}\n</tbody></table></div>'
    )


def name_value_table(values: Mapping[str, Any]) -> str:
    """Return a table of names and values without a header."""
    lines = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(str(value))}</td></tr>' for name, value in values.items()
    )
    return f'<div class="scroll"><table><tbody>\n{lines}\n</tbody></table></div>'


def _cell(value: Any) -> str:
    text = str(value)
    number = isinstance(value, (int, float)) or text[:1].isdigit() or (text[:1] in "+-" and len(text) < 9)
    return f'<td class="number">{escape(text)}</td>' if number else f"<td>{escape(text)}</td>"
