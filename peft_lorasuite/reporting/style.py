"""What all pictures share: one ink for paper and screen, light and dark, and figures as SVG inside a page."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import LoraSuiteError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, PAPER = "#16181d", "#fdfdfc"
"""Colors of text and ground in a file of its own; in a page they become the page's own, so that they follow it."""
FILL, ACCENT = "#86a3c9", "#b5651d"
"""Two mid-tones of different lightness that stand out from white and from black."""
SCALE = "viridis"
"""Lightness rises with the value: it reads the same in gray."""
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "ooo")
MARKS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")


def require() -> None:
    """Refuse early where matplotlib is missing.

    Raises:
        LoraSuiteError: When matplotlib is missing.
    """
    try:
        import matplotlib.figure  # noqa: F401 (asked for, not used)
    except ImportError as error:
        raise LoraSuiteError(
            "pictures need matplotlib, which is not installed", do="pip install peft-lorasuite[report]"
        ) from error


@contextmanager
def drawing(width: float, height: float) -> Iterator[Figure]:
    """Give an empty figure that belongs to no window; what is drawn inside the block has the shared look.

    Args:
        width: In inches.
        height: In inches.
    """
    require()
    import matplotlib
    from matplotlib.figure import Figure

    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    settings: Any = dict.fromkeys(inked, INK) | {
        "hatch.color": INK, "axes.facecolor": "none", "figure.facecolor": PAPER, "legend.facecolor": PAPER,
        "legend.edgecolor": INK, "font.family": "DejaVu Sans", "font.size": 9.0, "axes.titlesize": 10.0,
        "text.parse_math": False,  # a name with dollar signs is a name
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        yield Figure(figsize=(width, height), layout="constrained", dpi=150)


def svg(figure: Figure, name: str, label: str) -> str:
    """Return a figure as an SVG element for a page: no ground, text as text, ink and paper those of the page.

    Args:
        figure: The figure.
        name: A word that no other figure of the page has: its internal references start with it.
        label: What a screen reader says.
    """
    import matplotlib

    written = io.StringIO()
    nobody = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a letter that DejaVu lacks: the browser has it
        figure.savefig(written, format="svg", transparent=True, metadata=nobody)
    text = written.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="(\w+)_(\d+)"', rf'id="{name}-\1-\2"', text)  # axes_1 and the like: nothing refers to them
    text = text.replace(INK, "currentColor").replace(PAPER, "var(--paper)")
    return text.replace("<svg", f'<svg role="img" aria-label="{_attribute(label)}"', 1)


def readable(values: Any) -> Any:
    """Return black or white for text on cells of the shared color scale, by lightness.

    Args:
        values: Numbers from 0 to 1, any shape.
    """
    import numpy as np

    return np.where(np.asarray(values) > 0.55, "black", "white")


def ticks(count: int, most: int = 16) -> range:
    """Return numbers for an axis of ``count`` places, at most ``most`` of them."""
    return range(0, count, max(1, -(-count // most)))


def short(text: Any, length: int = 48) -> str:
    """Return a stranger's name on one line, cut in the middle where it is long."""
    plain = "".join(letter if letter.isprintable() else " " for letter in str(text))
    half = (length - 1) // 2
    return plain if len(plain) <= length else f"{plain[:half]}…{plain[-half:]}"


def _attribute(text: str) -> str:
    from html import escape

    return escape(text, quote=True)
