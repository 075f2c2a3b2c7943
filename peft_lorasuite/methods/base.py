"""The input and the result of a method."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

from ..adapters.adapter import Adapter, Key
from ..adapters.class_head import ClassHead
from ..adapters.experts import ExpertKey
from ..errors import LoraSuiteError
from ..linalg.lowrank import LowRank
from ..mapping.upgrade_map import UpgradeMap
from ..models.backbone import Backbone
from ..progress import Progress, no_progress, numbered, stage
from ..text.chat_options import ChatOptions
from ..text.examples import PromptsLike

READ_OLD, READ_NEW, FIT, DISTILL = (
    "reading the old adapter's answers", "reading the new model", "fitting to the answers", "distilling",
)  # fmt: skip
"""Titles of the stages of methods that run the models."""


@dataclass(frozen=True, eq=False)
class MethodInput:
    """Input of a method.

    Attributes:
        adapter: The adapter of the old backbone.
        map: The upgrade map of the pair.
        old: The old backbone, if available.
        new: The new backbone, if available.
        prompts: Unlabeled prompts, if the caller passed any.
        chat: How conversations among them are rendered.
        seed: Random seed.
        progress: Shows the progress of a long step.
    """

    adapter: Adapter
    map: UpgradeMap
    old: Backbone | None = None
    new: Backbone | None = None
    prompts: PromptsLike | None = None
    seed: int = 0
    progress: Progress = no_progress
    chat: ChatOptions = field(default_factory=ChatOptions)

    def with_stages(self, *titles: str) -> MethodInput:
        """Return the input of a method that has these stages, in this order: their numbers are shown."""
        return replace(self, progress=numbered(self.progress, titles))

    def stage(self, title: str) -> AbstractContextManager[None]:
        """Report the body of a ``with`` statement as a stage."""
        return stage(self.progress, title)

    def backbones(self, what: str) -> tuple[Backbone, Backbone]:
        """Return both backbones.

        Args:
            what: What needs them, for the error.

        Raises:
            LoraSuiteError: When one of them is missing.
        """
        if self.old is None or self.new is None:
            raise LoraSuiteError(
                f"{what} needs both backbones", wanted="the old and the new backbone",
                do="name them (--from and --to, old= and new=)",
            )  # fmt: skip
        return self.old, self.new


@dataclass(frozen=True, eq=False)
class MovedExperts:
    """Updates of the new backbone's experts.

    Attributes:
        updates: ``(new layer, new expert, part)`` -> update.
        sources: The same -> the old ``(layer, expert, part)`` that it comes from.
        dropped: Old ``(layer, expert, part)`` -> why it is not transferred.
        figures: New key -> figures for the report.
    """

    updates: dict[ExpertKey, LowRank] = field(default_factory=dict)
    sources: dict[ExpertKey, ExpertKey] = field(default_factory=dict)
    dropped: dict[ExpertKey, str] = field(default_factory=dict)
    figures: dict[ExpertKey, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class MethodResult:
    """Result of a method: updates of the new backbone, per layer and part.

    Attributes:
        updates: ``(new layer, part)`` -> update.
        sources: ``(new layer, part)`` -> the old ``(layer, part)`` that it comes from.
        dropped: Old ``(layer, part)`` -> why it is not transferred.
        figures: ``(new layer, part)`` -> figures for the report (residual, agreement of merged heads, ...).
        facts: Further entries of the report.
        rank: Rank of the new adapter, if not that of the old one.
        chat_template: The chat template that the new adapter was made for, if it is not the new backbone's own.
        head: Classification head of the new adapter, if the method fitted one.
        experts: Updates of experts; None if the method does not transfer them.
    """

    updates: Mapping[Key, LowRank]
    sources: Mapping[Key, Key] = field(default_factory=dict)
    dropped: Mapping[Key, str] = field(default_factory=dict)
    figures: Mapping[Key, Mapping[str, float]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    rank: int | None = None
    chat_template: str | None = None
    head: ClassHead | None = None
    experts: MovedExperts | None = None

    @property
    def has_updates(self) -> bool:
        """Whether there is an update of a module or an expert."""
        return bool(self.updates or (self.experts and self.experts.updates))
