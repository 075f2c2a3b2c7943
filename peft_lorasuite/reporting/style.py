"""The shared style of the figures: colors for light and dark pages, markers, and SVG output for HTML pages."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

from ..errors import LoraSuiteError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, PAPER = "#16181d", "#fdfdfc"
"""Foreground and background of an image file. `to_svg` replaces them by the page's own, which follow its theme."""
FILL, ACCENT = "#86a3c9", "#b5651d"
"""Two mid-tones of different lightness, readable on white and on black."""
COLORMAP = "viridis"
"""Its lightness rises with the value, so that it also reads in grayscale."""
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "ooo")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINE_STYLES = ("-", "--", "-.", ":")


def require_matplotlib() -> None:
    """Check that matplotlib is installed.

    Raises:
        LoraSuiteError: If it is not.
    """
    try:
        import matplotlib.figure  # noqa: F401 (only checked for)
    except ImportError as error:
        raise LoraSuiteError(
            "figures need matplotlib, which is not installed", do="pip install peft-lorasuite[report]"
        ) from error


@contextmanager
def new_figure(width: float, height: float) -> Iterator[Figure]:
    """Yield an empty figure without a window; inside the block matplotlib uses the shared style.

    Args:
        width: Width in inches.
        height: Height in inches.

    Raises:
        LoraSuiteError: If matplotlib is not installed.
    """
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    foreground = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    settings: Any = dict.fromkeys(foreground, INK) | {
        "hatch.color": INK, "axes.facecolor": "none", "figure.facecolor": PAPER, "legend.facecolor": PAPER,
        "legend.edgecolor": INK, "font.family": "DejaVu Sans", "font.size": 9.0, "axes.titlesize": 10.0,
        "text.parse_math": False,  # dollar signs in a name are part of the name
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        yield Figure(figsize=(width, height), layout="constrained", dpi=150)


def to_svg(figure: Figure, name: str, label: str) -> str:
    """Return a figure as an SVG element with a transparent background, text as text, and the page's colors.

    Args:
        figure: The figure.
        name: Prefix of the element's internal ids; must be unique on the page.
        label: Text for screen readers.
    """
    import matplotlib

    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a glyph that DejaVu lacks: the browser has it
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="(\w+)_(\d+)"', rf'id="{name}-\1-\2"', text)  # axes_1 and the like: nothing refers to them
    text = text.replace(INK, "currentColor").replace(PAPER, "var(--paper)")
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(label, quote=True)}"', 1)


def text_colors(values: Any) -> Any:
    """Return black or white for text on cells of the colormap, whichever contrasts.

    Args:
        values: Numbers from 0 to 1, any shape.
    """
    import numpy as np

    return np.where(np.asarray(values) > 0.55, "black", "white")


def ticks(count: int, most: int = 16) -> range:
    """Return at most ``most`` evenly spaced tick positions for an axis of ``count`` items."""
    return range(0, count, max(1, -(-count // most)))


def shorten(text: Any, length: int = 48) -> str:
    """Return an untrusted name on one line, cut in the middle if it is longer than ``length``."""
    plain = "".join(letter if letter.isprintable() else " " for letter in str(text))
    half = (length - 1) // 2
    return plain if len(plain) <= length else f"{plain[:half]}…{plain[-half:]}"
