"""The figures of a report as they come: each is drawn, or the page says why not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from . import html as pages
from .style import svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class Drawn:
    """What a page shows, and what it does not.

    Attributes:
        figures: Names of those that were drawn.
        missing: Name of what could not be shown -> the reason.
    """

    figures: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)

    def figure(self, name: str, draw: Callable[[], Figure], caption: str) -> str:
        """Draw a figure for the page."""
        self.figures.append(name)
        return pages.figure(svg(draw(), name, caption), caption)

    def lacks(self, name: str, reason: str) -> str:
        """Say that something is not shown, and why."""
        self.missing[name] = reason
        return pages.text(f"Not shown: {name}: {reason}.", "quiet")
