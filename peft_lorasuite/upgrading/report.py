"""What became of an adapter, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .._version import __version__
from ..adapters.adapter import Adapter
from ..methods.base import MethodResult


@dataclass(frozen=True)
class Report:
    """What became of an adapter; written beside the weights as ``lorasuite_report.json``.

    Attributes:
        adapter: The adapter that was upgraded.
        old: Its backbone.
        new: The new backbone.
        method: The method that ran, and its options.
        rank: Rank of the result.
        modules: Per new module: its sources, energy kept, residual of the maps.
        tensors: Every tensor of the source -> ``"transferred"`` or the reason why not.
        facts: What the method and the map measured, and, for ``auto``, why the method was picked; under
            ``differences``, what the two structures differ in and how that is met; under ``prediction``, what the map
            and the method's own fit let expect; under ``named_base``, that the adapter names
            another backbone than the map's.
        revisions: Commits on the Hub of ``adapter``, ``old`` and ``new``; None for what came from elsewhere.
    """

    adapter: str
    old: str
    new: str
    method: Mapping[str, Any]
    rank: int
    modules: Sequence[Mapping[str, Any]]
    tensors: Mapping[str, str]
    facts: Mapping[str, Any] = field(default_factory=dict)
    revisions: Mapping[str, str | None] = field(default_factory=dict)
    version: str = __version__

    @property
    def coverage(self) -> float:
        """Share of the source's tensors that were transferred."""
        return sum(fate == "transferred" for fate in self.tensors.values()) / max(len(self.tensors), 1)

    @property
    def energy_kept(self) -> float:
        """Mean share of the energy that rank truncation kept, over the modules."""
        return sum(module["energy_kept"] for module in self.modules) / max(len(self.modules), 1)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "coverage": round(self.coverage, 6), "energy_kept": round(self.energy_kept, 6)}


def fates(adapter: Adapter, draft: MethodResult) -> dict[str, str]:
    """Say of every tensor of the source whether it was transferred, or why not."""
    reasons: dict[str, list[str]] = {}
    counts: dict[str, int] = {}
    for key, names in adapter.names.items():
        for name in names:
            counts[name] = counts.get(name, 0) + 1
            if key in draft.dropped:
                reasons.setdefault(name, []).append(f"{key[1]}: {draft.dropped[key]}")
    info = {}
    for name, count in counts.items():
        lost = reasons.get(name, [])
        partly = "in part; " if lost and len(lost) < count else ""
        info[name] = f"{partly}not transferred: {'; '.join(lost)}" if lost else "transferred"
    return dict(sorted({**info, **{name: f"not transferred: {why}" for name, why in adapter.unused.items()}}.items()))
